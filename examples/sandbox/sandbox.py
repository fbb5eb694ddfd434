"""A Convox world on one machine: a Docker Engine, ECR, and a rack, to try and to test deploys.

As root on Debian it is complete: what is missing of docker.io, docker-registry and busybox-static
is installed, an engine is started if none answers, and the registry stands under ECR's own host
name with TLS, behind a login, with moto's ECR API beside it. Elsewhere it takes the engine that
answers and a registry on localhost, behind a login too, and there is no ECR.

    with Sandbox() as sandbox:
        subprocess.run(["./convox_deploy.py"], cwd=..., env=sandbox.env)
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Callable

import bcrypt
import trustme
from bootstrap import DEBIAN, install_packages

HERE = Path(__file__).resolve().parent
ACCOUNT, REGION = "123456789012", "us-east-1"  # moto's account
ECR = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
ECR_ADDRESS = "127.0.0.77"  # a loopback address of its own, as port 443 of 127.0.0.1 may be taken
REGISTRY_PASSWORD = f"{ACCOUNT}-auth-token"  # what moto's GetAuthorizationToken gives for user AWS
RACK_HOST, RACK_PASSWORD, DEPLOY_KEY = "rack.sandbox", "rack/password", "deploy-key"
BASE_IMAGE = "convox-sandbox-base"
BRIDGE, BRIDGE_ADDRESS = "convox-sandbox", "198.51.100.1/24"  # a range for documentation (RFC 5737)
HOSTS_MARK = "# convox-deploy sandbox"
FRONT = """
daemon off;
user root;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{}}
http {{
  access_log off;
  client_max_body_size 0;
  client_body_temp_path {directory}/nginx-body;
  proxy_temp_path {directory}/nginx-proxy;
  fastcgi_temp_path {directory}/nginx-fastcgi;
  uwsgi_temp_path {directory}/nginx-uwsgi;
  scgi_temp_path {directory}/nginx-scgi;
  upstream registry {{ server 127.0.0.1:{registry_port}; keepalive 16; }}
  proxy_http_version 1.1;
  proxy_request_buffering off;
  proxy_buffering off;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  proxy_set_header X-Forwarded-Proto https;
  server {{
    listen {address}:443 ssl;
    ssl_certificate {directory}/registry.crt;
    ssl_certificate_key {directory}/registry.key;
    location / {{ proxy_pass http://registry; }}
    location ~ ^/v2/(?<name>.+)/(blobs|manifests|tags)/ {{
      auth_request /exists;
      error_page 403 = @missing;
      proxy_pass http://registry;
    }}
    location = /exists {{
      internal;
      proxy_pass http://127.0.0.1:{exists_port}/$name;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
    }}
    location @missing {{
      default_type application/json;
      return 404 '{{"errors": [{{"code": "NAME_UNKNOWN", "message": "The repository with name \\'$name\\' does not exist in the registry with id \\'{account}\\'"}}]}}';
    }}
  }}
}}
"""  # like ECR, it refuses a push to a repository that does not exist


class SandboxError(Exception):
    """The sandbox cannot be had on this machine. The text says what is missing."""


class Service:
    """A server that the sandbox runs: started, awaited, and stopped with it."""

    def __init__(
        self, name: str, command: list[str], log: Path, answers: Callable[[], bool], **how: object
    ) -> None:
        self.name, self.command, self.log, self.answers, self.how = name, command, log, answers, how
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 30) -> None:
        """Starts the server and returns once it answers. Raises SandboxError if it ends or does not answer in time."""
        end_with_us = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*end_with_us, *self.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **self.how,  # type: ignore[call-overload]
            )  # fmt: skip
        deadline = time.monotonic() + seconds
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                last_words = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
                self.stop()
                raise SandboxError(f"{self.name} does not start:\n{last_words}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


class Sandbox:
    """The running sandbox. `env` is the environment to deploy in, `registry_host` begins the image names.

    `say` is given a line for each thing that is set up outside of the sandbox's own directory.
    Only one sandbox with ECR runs on a machine at a time; a second one waits for the first.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.stack = contextlib.ExitStack()
        self.has_ecr = os.geteuid() == 0 and DEBIAN
        self.registry_host = ECR
        self.env = dict(os.environ)

    def __enter__(self) -> Sandbox:
        try:
            self.set_up()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.close()

    def set_up(self) -> None:
        if self.has_ecr:
            self.take_turns()
        self.directory = Path(
            self.stack.enter_context(tempfile.TemporaryDirectory(prefix="convox-sandbox-"))
        )
        self.env = self.make_environment()
        if self.has_ecr:
            self.install_missing()
        self.start_engine()
        self.make_base_image()
        if self.has_ecr:
            self.start_ecr()
        else:
            self.start_plain_registry()
        self.make_rack()

    def take_turns(self) -> None:
        lock = self.stack.enter_context(open("/run/lock/convox-sandbox", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.say("Another sandbox has ECR's address on this machine; waiting for it to end ...")
            fcntl.flock(lock, fcntl.LOCK_EX)

    def make_environment(self) -> dict[str, str]:
        """Returns our environment without what names other racks, registries and clouds."""
        foreign = (
            "CONVOX_",
            "RACK_",
            "AWS_",
            "DEPLOY_",
            "GIT_",
            "APP_NAME",
            "IMAGE_TAG",
            "DOCKER_COMPOSE",
            "SKIP_ECR",
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        programs = self.directory / "bin"
        programs.mkdir()
        (programs / "convox").symlink_to(HERE / "convox")
        env["PATH"] = os.pathsep.join(
            [str(programs), os.path.dirname(sys.executable), env.get("PATH", os.defpath)]
        )
        env["DOCKER_CONFIG"] = str(self.directory / "docker-config")
        env["CONVOX_STANDIN"] = str(self.directory / "rack")
        env.update(CONVOX_HOST=RACK_HOST, CONVOX_PASSWORD=RACK_PASSWORD)
        env.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)
        env.update(AWS_ACCESS_KEY_ID="sandbox", AWS_SECRET_ACCESS_KEY="sandbox-secret")
        env["NO_PROXY"] = env["no_proxy"] = f"localhost,127.0.0.1,{ECR}"
        return env

    def install_missing(self) -> None:
        """Installs what the sandbox runs, as far as it is not here: as root on Debian only."""
        wanted = {
            "docker.io": "dockerd",
            "docker-registry": "docker-registry",
            "busybox-static": "busybox",
            "nginx": "nginx",
            "iproute2": "ip",
        }
        if self.run("docker", "info").returncode == 0:
            del wanted["docker.io"], wanted["iproute2"]
        if missing := [package for package, program in wanted.items() if not shutil.which(program)]:
            install_packages(*missing)

    def run(self, *argv: str, **how: object) -> subprocess.CompletedProcess[str]:
        """Runs a command in the sandbox's environment, unseen, and returns what it said, whatever its exit status."""
        how = {"env": self.env, "capture_output": True, "text": True, "check": False, **how}
        try:
            return subprocess.run(argv, **how)  # type: ignore[call-overload, no-any-return]
        except FileNotFoundError:
            return subprocess.CompletedProcess(argv, 127, "", f"{argv[0]} is not installed")

    def check(self, *argv: str, **how: object) -> str:
        """Runs a command in the sandbox's environment and returns its output. Raises SandboxError if it fails."""
        done = self.run(*argv, **how)
        if done.returncode:
            raise SandboxError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
        return done.stdout

    def service(
        self, name: str, command: list[str], answers: Callable[[], bool], **how: object
    ) -> Service:
        service = Service(
            name, command, self.directory / f"{name}.log", answers, env=self.env, **how
        )
        service.start()
        self.stack.callback(service.stop)
        return service

    # --- the engine ---

    def start_engine(self) -> None:
        answer = self.run("docker", "version", "--format", "{{.Server.Version}}")
        if answer.returncode == 0:
            self.say(f"Using the Docker Engine {answer.stdout.strip()} that is here.")
            self.stack.callback(self.remove_our_images)
        elif self.has_ecr:
            home = self.directory / "docker"
            self.env["DOCKER_HOST"] = f"unix://{home}/docker.sock"
            home.mkdir()
            self.make_bridge()
            command = [
                "dockerd",
                "--bridge",
                BRIDGE,
                "--data-root",
                f"{home}/data",
                "--exec-root",
                f"{home}/run",
            ]
            command += ["--host", self.env["DOCKER_HOST"], "--pidfile", f"{home}/dockerd.pid"]
            self.say("Starting a Docker Engine of the sandbox's own.")
            self.service("dockerd", command, lambda: self.run("docker", "info").returncode == 0)
        else:
            raise SandboxError(
                "No Docker Engine answers: start Docker and try again. (As root on Debian or Ubuntu the sandbox"
                f" brings its own.)\ndocker says: {answer.stderr.strip()}"
            )
        self.stack.callback(self.remove_containers)

    def make_bridge(self) -> None:
        """Make the engine's network. On docker0, containers of an engine that was killed may hold our addresses."""
        self.run("ip", "link", "delete", BRIDGE)
        self.check("ip", "link", "add", BRIDGE, "type", "bridge")
        self.stack.callback(self.run, "ip", "link", "delete", BRIDGE)
        self.check("ip", "address", "add", BRIDGE_ADDRESS, "dev", BRIDGE)
        self.check("ip", "link", "set", BRIDGE, "up")

    def remove_containers(self) -> None:
        ours = f"label=convox.rack={self.env['CONVOX_STANDIN']}"
        if ids := self.run("docker", "ps", "--all", "--quiet", "--filter", ours).stdout.split():
            self.run("docker", "rm", "--force", *ids)

    def remove_our_images(self) -> None:
        names = self.run(
            "docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"
        ).stdout.split()
        if ours := [
            name
            for name in names
            if name.startswith((BASE_IMAGE, "convox-standin/", self.registry_host))
        ]:
            self.run("docker", "image", "rm", "--force", *ours)

    def make_base_image(self) -> None:
        """Imports an image of the one program busybox; where that is not on this machine, pulls it."""
        busybox = shutil.which("busybox")
        if not (busybox and sys.platform == "linux" and self.import_busybox(Path(busybox))):
            self.check("docker", "pull", "busybox")
            self.check("docker", "tag", "busybox", BASE_IMAGE)

    def import_busybox(self, busybox: Path) -> bool:
        applets = subprocess.run(
            [busybox, "--list"], capture_output=True, text=True, check=False
        ).stdout.split()
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as image:
            image.add(busybox, "bin/busybox")
            for applet in applets:
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                if applet != "busybox":
                    image.addfile(link)
        imported = self.run(
            "docker", "import", "-", BASE_IMAGE, input=archive.getvalue(), text=False
        )
        return (
            imported.returncode == 0
            and self.run("docker", "run", "--rm", BASE_IMAGE, "true").returncode == 0
        )

    # --- the registries ---

    def start_ecr(self) -> None:
        """Starts moto's ECR API, and a registry behind a front with ECR's host name that docker trusts."""
        api_port, exists_port, registry_port = free_ports(3)
        self.env["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{api_port}"
        api = [sys.executable, str(HERE / "ecr.py"), str(api_port), str(exists_port)]
        self.service("ecr", api, lambda: listens("127.0.0.1", api_port))
        self.say(
            f"Adding {ECR} to /etc/hosts, and its certificate to /etc/docker/certs.d, until the sandbox ends."
        )
        self.add_to_hosts()
        self.issue_certificate()
        self.start_registry(registry_port)
        ports = {"registry_port": registry_port, "exists_port": exists_port}
        front = self.directory / "nginx.conf"
        front.write_text(
            FRONT.format(directory=self.directory, address=ECR_ADDRESS, account=ACCOUNT, **ports)
        )
        command = ["nginx", "-c", str(front), "-e", "stderr"]
        self.front = self.service("nginx", command, lambda: listens(ECR_ADDRESS, 443))

    def issue_certificate(self) -> None:
        authority = trustme.CA()
        trusted = Path("/etc/docker/certs.d", ECR)
        for directory in (trusted.parent.parent, trusted.parent, trusted):
            if not directory.exists():
                directory.mkdir()
                self.stack.callback(shutil.rmtree, directory, ignore_errors=True)
        authority.cert_pem.write_to_path(str(trusted / "ca.crt"))
        issued = authority.issue_cert(ECR)
        issued.cert_chain_pems[0].write_to_path(str(self.directory / "registry.crt"))
        issued.private_key_pem.write_to_path(str(self.directory / "registry.key"))

    def add_to_hosts(self) -> None:
        hosts = Path("/etc/hosts")

        def without_ours() -> str:
            return "".join(
                line for line in hosts.read_text().splitlines(True) if HOSTS_MARK not in line
            )

        hosts.write_text(f"{without_ours()}{ECR_ADDRESS} {ECR} {HOSTS_MARK}\n")
        self.stack.callback(lambda: hosts.write_text(without_ours()))

    def start_plain_registry(self) -> None:
        """Starts a registry on localhost, to which docker talks without TLS, and logs docker in to it."""
        [port] = free_ports(1)
        self.registry_host = f"localhost:{port}"
        self.say(
            f"No ECR here (that takes root and Debian): a registry on {self.registry_host} stands in."
        )
        if shutil.which("docker-registry"):
            self.start_registry(port)
        else:
            self.run_registry_container(port)
        self.log_in(self.env)

    def log_in(self, env: dict[str, str]) -> None:
        """Logs docker in to the registry; an engine may take some seconds to see a new line in /etc/hosts."""
        login = ("docker", "login", "--username", "AWS", "--password-stdin", self.registry_host)
        wait_for(
            lambda: self.run(*login, input=REGISTRY_PASSWORD, env=env).returncode == 0,
            "the registry",
        )

    def start_registry(self, port: int) -> None:
        """Starts docker-registry on localhost, without TLS. Its configuration is JSON, which is YAML too."""
        config = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.directory / "registry")},
                "delete": {"enabled": True},
            },
            "http": {"addr": f"127.0.0.1:{port}"},
            "auth": {"htpasswd": {"realm": "sandbox", "path": str(self.htpasswd())}},
        }
        path = self.directory / "registry.json"
        path.write_text(json.dumps(config))
        command = ["docker-registry", "serve", str(path)]
        self.service("registry", command, lambda: listens("127.0.0.1", port))

    def run_registry_container(self, port: int) -> None:
        name = f"convox-sandbox-registry-{port}"
        env = {"REGISTRY_AUTH": "htpasswd", "REGISTRY_AUTH_HTPASSWD_REALM": "sandbox"}
        env["REGISTRY_AUTH_HTPASSWD_PATH"] = "/htpasswd"
        options = [word for pair in env.items() for word in ("--env", "=".join(pair))]
        self.check(
            "docker",
            "create",
            "--name",
            name,
            "--publish",
            f"127.0.0.1:{port}:5000",
            *options,
            "registry:2",
        )
        self.stack.callback(self.run, "docker", "rm", "--force", "--volumes", name)
        self.check("docker", "cp", str(self.htpasswd()), f"{name}:/htpasswd")
        self.check("docker", "start", name)
        wait_for(lambda: answers_http(f"http://127.0.0.1:{port}/v2/"), "the registry")

    def htpasswd(self) -> Path:
        path = self.directory / "htpasswd"
        path.write_text(
            "AWS:" + bcrypt.hashpw(REGISTRY_PASSWORD.encode(), bcrypt.gensalt(5)).decode() + "\n"
        )
        path.chmod(0o644)
        return path

    # --- the rack ---

    def make_rack(self) -> None:
        """Gives the rack the registry's login, as `convox registries add` would."""
        config = Path(self.env["CONVOX_STANDIN"], "docker-config")
        config.mkdir(parents=True)
        self.log_in({**self.env, "DOCKER_CONFIG": str(config)})


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def answers_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def wait_for(is_so: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise SandboxError(f"{what} does not answer.")
        time.sleep(0.05)
