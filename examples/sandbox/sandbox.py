"""A local environment for trying out and testing deploys: a Docker Engine, ECR and a simulated rack.

As root on Debian it is complete. It installs the Debian packages it needs, starts a Docker Engine
if none is running, and serves moto's ECR API and a registry under ECR's own host name, with TLS and
authentication. Elsewhere it uses the existing Docker Engine and a registry on localhost, also with
authentication but without ECR. The rack's own registry, for `convox build --external`, is another
one on localhost.

    with Sandbox() as sandbox:
        subprocess.run(["./convox_deploy.py"], cwd=..., env=sandbox.env)
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import secrets
import shutil
import socket
import ssl
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
ACCOUNT, REGION = "123456789012", "us-east-1"  # moto's defaults
ECR = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
ECR_ADDRESS = (
    "127.0.0.77"  # a separate loopback address, because port 443 of 127.0.0.1 may be in use
)
REGISTRY_PASSWORD = (
    f"{ACCOUNT}-auth-token"  # moto's GetAuthorizationToken returns this for user AWS
)
RACK_HOST, RACK_PASSWORD, DEPLOY_KEY = "rack.sandbox", "sandbox-password", "deploy-key"
BASE_IMAGE = "convox-sandbox-base"
BRIDGE, BRIDGE_ADDRESS = (
    "convox-sandbox",
    "198.51.100.1/24",
)  # reserved for documentation (RFC 5737)
HOSTS_MARK = "# convox-deploy sandbox"
PROXY_CONFIG = """
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
"""  # like ECR, it rejects a push to a repository that does not exist


class SandboxError(Exception):
    """The sandbox can't run on this machine. The message says what is missing."""


class Service:
    """A server process that is stopped together with the sandbox."""

    def __init__(
        self, name: str, command: list[str], log: Path, is_ready: Callable[[], bool], **how: object
    ) -> None:
        self.name, self.command, self.log, self.is_ready, self.how = (
            name,
            command,
            log,
            is_ready,
            how,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 30) -> None:
        """Start the server and wait until it responds. Raise SandboxError if it exits or does not respond in time."""
        stop_with_parent = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*stop_with_parent, *self.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **self.how,  # type: ignore[call-overload]
            )  # fmt: skip
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                log_tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
                self.stop()
                raise SandboxError(f"{self.name} did not start:\n{log_tail}")
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
    """A sandbox. Deploy with the environment variables in `env`, and with image names that start with `registry_host`.

    `report` is called with a message for everything that is set up outside the sandbox's own directory.
    Only one sandbox with ECR can run on a machine at a time. A second one waits for the first.
    """

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self.report = report
        self.stack = contextlib.ExitStack()
        self.has_ecr = os.geteuid() == 0 and DEBIAN
        self.has_own_engine = False
        self.registry_host = ECR
        self.authority = trustme.CA()
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
            self.wait_for_turn()
        self.directory = Path(
            self.stack.enter_context(tempfile.TemporaryDirectory(prefix="convox-sandbox-"))
        )
        self.env = self.clean_environment()
        if self.has_ecr:
            self.install_missing()
            self.announce_ecr()  # before the engine starts, which notices later changes only after seconds
        self.start_engine()
        self.create_base_image()
        if self.has_ecr:
            self.start_ecr()
        else:
            self.start_plain_registry()
        self.set_up_rack()

    def wait_for_turn(self) -> None:
        lock = self.stack.enter_context(open("/run/lock/convox-sandbox", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.report("Another sandbox is using the ECR address; waiting for it to finish ...")
            fcntl.flock(lock, fcntl.LOCK_EX)

    def clean_environment(self) -> dict[str, str]:
        """Return our environment without variables that refer to other racks, registries and clouds, or to a CI system."""
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
            "CI",
            "GITHUB_",
            "GITLAB_",
            "JENKINS_",
            "BUILD",
            "BRANCH_NAME",
            "TRAVIS_",
            "DRONE_",
            "BITBUCKET_",
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        programs = self.directory / "bin"
        programs.mkdir()
        (programs / "convox").symlink_to(HERE / "convox")
        env["PATH"] = os.pathsep.join(
            [str(programs), os.path.dirname(sys.executable), env.get("PATH", os.defpath)]
        )
        env["DOCKER_CONFIG"] = str(create_docker_config(self.directory / "docker-config"))
        if {"DOCKER_TLS", "DOCKER_TLS_VERIFY"} & env.keys():
            env.setdefault("DOCKER_CERT_PATH", str(docker_config_of_user()))
        env["CONVOX_STANDIN"] = str(self.directory / "rack")
        env.update(CONVOX_HOST=RACK_HOST, CONVOX_PASSWORD=RACK_PASSWORD)
        env.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)
        env.update(AWS_ACCESS_KEY_ID="sandbox", AWS_SECRET_ACCESS_KEY="sandbox-secret")
        env["NO_PROXY"] = env["no_proxy"] = f"localhost,127.0.0.1,{ECR}"
        return env

    def install_missing(self) -> None:
        """Install the programs the sandbox needs that are missing."""
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

    @property
    def legacy_env(self) -> dict[str, str]:
        """Our environment for builds with docker's legacy builder."""
        return {**self.env, "DOCKER_BUILDKIT": "0"}

    @property
    def buildkit_env(self) -> dict[str, str]:
        """Our environment for builds with BuildKit. If our docker lacks buildx, use Debian's, which needs none."""
        env = {**self.env, "DOCKER_BUILDKIT": "1"}
        if "--secret" not in self.run("docker", "build", "--help", env=env).stdout:
            ours, path = env["PATH"].split(os.pathsep)[:2], env["PATH"]
            env["PATH"] = os.pathsep.join([*ours, "/usr/bin", path])
        return env

    def run(self, *argv: str, **how: object) -> subprocess.CompletedProcess[str]:
        """Run a command in the sandbox's environment without showing it. Return the result, whatever the exit code."""
        how = {"env": self.env, "capture_output": True, "text": True, "check": False, **how}
        try:
            return subprocess.run(argv, **how)  # type: ignore[call-overload, no-any-return]
        except FileNotFoundError:
            return subprocess.CompletedProcess(argv, 127, "", f"{argv[0]} is not installed")

    def check(self, *argv: str, **how: object) -> str:
        """Run a command in the sandbox's environment and return its output. Raise SandboxError if it fails."""
        done = self.run(*argv, **how)
        if done.returncode:
            raise SandboxError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
        return done.stdout

    def service(
        self, name: str, command: list[str], is_ready: Callable[[], bool], **how: object
    ) -> Service:
        service = Service(
            name, command, self.directory / f"{name}.log", is_ready, env=self.env, **how
        )
        service.start()
        self.stack.callback(service.stop)
        return service

    # --- the engine ---

    def start_engine(self) -> None:
        version = self.run("docker", "version", "--format", "{{.Server.Version}}")
        if version.returncode == 0:
            self.report(f"Using the existing Docker Engine {version.stdout.strip()}.")
            self.stack.callback(self.remove_our_images)
        elif self.has_ecr:
            home = self.directory / "docker"
            self.env["DOCKER_HOST"] = f"unix://{home}/docker.sock"
            self.env.pop("DOCKER_CONTEXT", None)
            home.mkdir()
            self.has_own_engine = True
            self.create_bridge()
            # BuildKit in Docker 20.10 does not look for certificates in /etc/docker/certs.d.
            command = ["env", f"SSL_CERT_FILE={self.bundle_certificates()}", "dockerd"]
            command += ["--bridge", BRIDGE]
            command += ["--data-root", f"{home}/data", "--exec-root", f"{home}/run"]
            command += ["--host", self.env["DOCKER_HOST"], "--pidfile", f"{home}/dockerd.pid"]
            self.stack.callback(self.unmount, home)
            self.report("Starting a separate Docker Engine for the sandbox.")
            self.service("dockerd", command, lambda: self.run("docker", "info").returncode == 0)
        else:
            raise SandboxError(
                "Cannot reach the Docker daemon. Start Docker and try again. (As root on Debian or Ubuntu, the"
                f" sandbox starts its own.)\n{version.stderr.strip()}"
            )
        self.stack.callback(self.remove_containers)

    def bundle_certificates(self) -> Path:
        """Write the certificates trusted by the system, and the sandbox's own, to one file."""
        bundle, trusted = self.directory / "trusted.crt", ssl.get_default_verify_paths().cafile
        bundle.write_bytes(Path(trusted).read_bytes() if trusted else b"")
        self.authority.cert_pem.write_to_path(str(bundle), append=True)
        return bundle

    def create_bridge(self) -> None:
        """Create the engine's network. On docker0, containers of a killed engine may still hold our addresses."""
        self.run("ip", "link", "delete", BRIDGE)
        self.check("ip", "link", "add", BRIDGE, "type", "bridge")
        self.stack.callback(self.run, "ip", "link", "delete", BRIDGE)
        self.check("ip", "address", "add", BRIDGE_ADDRESS, "dev", BRIDGE)
        self.check("ip", "link", "set", BRIDGE, "up")

    def unmount(self, home: Path) -> None:
        """Unmount what the engine leaves behind: the host's network, used by `docker build --network host`."""
        for namespace in home.glob("run/netns/*"):
            self.run("umount", str(namespace))

    def remove_containers(self) -> None:
        ours = f"label=convox.rack={self.env['CONVOX_STANDIN']}"
        if ids := self.run("docker", "ps", "--all", "--quiet", "--filter", ours).stdout.split():
            self.run("docker", "rm", "--force", *ids)

    def wipe_engine(self) -> None:
        """Reset the engine to that of a new machine, except for the base image, which cannot be pulled."""
        if not self.has_own_engine:
            raise SandboxError("The images of this engine are not the sandbox's to remove.")
        self.remove_containers()
        listed = self.check("docker", "image", "ls", "--format", "{{.ID}} {{.Repository}}")
        images = [line.split() for line in listed.splitlines()]
        base = {image for image, name in images if name == BASE_IMAGE}
        if foreign := [image for image in dict(images) if image not in base]:  # the newest first
            self.check("docker", "image", "rm", "--force", *foreign)
        self.check("docker", "builder", "prune", "--all", "--force")

    def remove_our_images(self) -> None:
        names = self.run(
            "docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"
        ).stdout.split()
        rack = Path(self.env["CONVOX_STANDIN"], "rack.json")
        by_cli = json.loads(rack.read_text())["tags"] if rack.exists() else []
        if ours := [
            name
            for name in names
            if name.startswith((BASE_IMAGE, "convox-standin/", self.registry_host))
            or name.removesuffix(":latest") in by_cli
        ]:
            self.run("docker", "image", "rm", "--force", *ours)

    def create_base_image(self) -> None:
        """Import an image that contains only busybox. Without a usable busybox on this machine, pull one."""
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
        """Start moto's ECR API, and a registry behind a proxy with ECR's host name and a certificate docker trusts."""
        api_port, exists_port, registry_port = free_ports(3)
        self.env["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{api_port}"
        api = [sys.executable, str(HERE / "ecr.py"), str(api_port), str(exists_port)]
        self.service("ecr", api, lambda: listens("127.0.0.1", api_port))
        self.start_registry("registry", registry_port, "AWS", REGISTRY_PASSWORD)
        ports = {"registry_port": registry_port, "exists_port": exists_port}
        config = self.directory / "nginx.conf"
        config.write_text(
            PROXY_CONFIG.format(
                directory=self.directory, address=ECR_ADDRESS, account=ACCOUNT, **ports
            )
        )
        command = ["nginx", "-c", str(config), "-e", "stderr"]
        self.proxy = self.service("nginx", command, lambda: listens(ECR_ADDRESS, 443))

    def announce_ecr(self) -> None:
        self.report(
            f"Adding {ECR} to /etc/hosts and its certificate to /etc/docker/certs.d (removed on exit)."
        )
        self.add_to_hosts()
        self.issue_certificate()

    def issue_certificate(self) -> None:
        trusted = Path("/etc/docker/certs.d", ECR)
        for directory in (trusted.parent.parent, trusted.parent, trusted):
            if not directory.exists():
                directory.mkdir()
                self.stack.callback(shutil.rmtree, directory, ignore_errors=True)
        self.authority.cert_pem.write_to_path(str(trusted / "ca.crt"))
        issued = self.authority.issue_cert(ECR)
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
        """Start a registry on localhost, which docker accesses without TLS, and log docker in to it."""
        [port] = free_ports(1)
        self.registry_host = f"localhost:{port}"
        self.report(
            f"ECR emulation needs root on Debian; using a plain registry on {self.registry_host} instead."
        )
        self.start_registry("registry", port, "AWS", REGISTRY_PASSWORD)
        self.log_in(self.env, self.registry_host, "AWS", REGISTRY_PASSWORD)

    def log_in(self, env: dict[str, str], host: str, user: str, password: str) -> None:
        """Log docker in to a registry. Retry, because docker may take seconds to notice a new line in /etc/hosts."""
        login = ("docker", "login", "--username", user, "--password-stdin", host)
        wait_for(lambda: self.run(*login, input=password, env=env).returncode == 0, "the registry")

    def start_registry(self, name: str, port: int, user: str, password: str) -> None:
        """Start a registry on localhost without TLS: docker-registry or, where that is not installed, its container."""
        htpasswd = self.directory / f"{name}.htpasswd"
        hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(5)).decode()
        htpasswd.write_text(f"{user}:{hashed}\n")
        htpasswd.chmod(0o644)
        if not shutil.which("docker-registry"):
            self.run_registry_container(port, htpasswd)
            return
        config = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.directory / name)},
                "delete": {"enabled": True},
            },
            "http": {"addr": f"127.0.0.1:{port}"},
            "auth": {"htpasswd": {"realm": "sandbox", "path": str(htpasswd)}},
        }
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(config))  # JSON is valid YAML
        command = ["docker-registry", "serve", str(path)]
        self.service(name, command, lambda: listens("127.0.0.1", port))

    def run_registry_container(self, port: int, htpasswd: Path) -> None:
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
        self.check("docker", "cp", str(htpasswd), f"{name}:/htpasswd")
        self.check("docker", "start", name)
        wait_for(lambda: responds_to_http(f"http://127.0.0.1:{port}/v2/"), "the registry")

    # --- the rack ---

    def set_up_rack(self) -> None:
        """Give the rack a registry of its own, and its credentials and the other registry's (`convox registries add`)."""
        state = Path(self.env["CONVOX_STANDIN"])
        config = create_docker_config(state / "docker-config")
        env = {**self.env, "DOCKER_CONFIG": str(config)}
        self.log_in(env, self.registry_host, "AWS", REGISTRY_PASSWORD)
        [port] = free_ports(1)
        own = {"host": f"localhost:{port}", "username": "rack", "password": secrets.token_hex(16)}
        self.start_registry("rack-registry", port, own["username"], own["password"])
        self.log_in(env, *own.values())
        (state / "own-registry.json").write_text(json.dumps(own))


def docker_config_of_user() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser().absolute()


def create_docker_config(directory: Path) -> Path:
    """Create a docker configuration like the user's, with the same contexts and plugins, but without the logins."""
    directory.mkdir(parents=True)
    users = docker_config_of_user()
    for name in ("contexts", "cli-plugins"):
        if (users / name).is_dir():
            (directory / name).symlink_to(users / name)
    path = users / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: config[key] for key in ("currentContext", "cliPluginsExtraDirs") if key in config}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def responds_to_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def wait_for(is_ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_ready():
        if time.monotonic() > deadline:
            raise SandboxError(f"Timed out waiting for {what}.")
        time.sleep(0.05)
