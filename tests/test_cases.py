"""Situations of first days, public reports and public apps: what people have, and what is right there."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ECR, IMAGE_ID, REAL_GIT, ROOT, SHORT_ID, Ran, World, ended, has_ended, paired

BUILD, EXTERNAL, PROMOTE = (
    "docker build --tag",
    "convox build --external",
    "convox releases promote",
)
CHANGES = (BUILD, "docker push", "convox build --app", EXTERNAL, PROMOTE + " --app")
ENV = "convox env --app shop"
KEY = "ERROR: operation not permitted for deploy keys\n"
BASE = "x-base: &base {port: 3000}\n"


@pytest.fixture(autouse=True)
def as_it_is(world: World) -> None:
    """The app is as it is: a convox.yml without images, in a git repository, with a v3 CLI."""
    world.env["CONVOX_STANDIN_CLI"] = "v3"
    world.constants.update(POLL_SECONDS=0, PUSH_PAUSE=0)
    (world.app / "docker-compose.yml").unlink()
    write(world, "{web: {build: .}}")
    world.add_git()


def write(world: World, services: str, before: str = "", name: str = "convox.yml") -> None:
    world.write(name, f"{before}services: {services}\n")


def with_tag(world: World, repository: str = f"{ECR}/shop", more: str = "") -> None:
    write(world, f"{{web: {{image: '{repository}:TAG'{more}}}}}")


def succeeded(ran: Ran) -> Ran:
    assert ran.status == 0, ran.text
    return ran


def refused(world: World, ran: Ran, *texts: str) -> None:
    """Nothing was started, and the error is one clean message."""
    assert ran.status == 2, ran.text
    assert world.commands(*CHANGES) == [] and "Traceback" not in ran.text
    for text in texts:
        assert text in ran.err, ran.err


def on_a_terminal(world: World, *args: str, **env: str | None) -> str:
    master, terminal = pty.openpty()
    process = world.start(*args, env=env, stdout=terminal, stderr=terminal)
    os.close(terminal)
    written = b""
    while chunk := read(master):
        written += chunk
    os.close(master)
    assert process.wait() == 0, written
    return written.decode().replace("\r\n", "\n")


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux's error when the other end is closed
        return b""


def git(world: World, *words: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([REAL_GIT, *identity, *words], cwd=world.app, check=True, capture_output=True)


def result(world: World) -> dict[str, Any]:
    return dict(json.loads((world.app / "result.json").read_text()))


# --- 1, 2: docker contexts, platforms and a push of the CLI ---------------------------

BOTH = "linux/amd64,linux/arm64"


@pytest.mark.parametrize(
    "args", [["--platform", BOTH], [f"--platform={BOTH}"], ["--platform=x", "--platform", BOTH]]
)
def test_all_platforms_that_were_built_reach_the_rack(world: World, args: list[str]) -> None:
    ran = succeeded(world.deploy("--result", "result.json", "--", *args))
    assert world.call(EXTERNAL).env["DOCKER_DEFAULT_PLATFORM"] == BOTH
    assert f"\nPushing to the rack's registry: web ({BOTH})\n" in ran.out
    assert result(world)["images"][0]["platform"] == BOTH


@pytest.mark.parametrize("machine", ["arm64", "aarch64"])
def test_on_an_arm64_machine_preflight_says_what_is_built(world: World, machine: str) -> None:
    world.constants["MACHINE"] = machine
    warning = "\nwarning: builds linux/arm64. If the rack runs on Intel or AMD, add "
    assert f"{warning}`-- --platform linux/amd64`.\n" in succeeded(world.deploy("--dry-run")).out
    for args, env in (
        (["--", "--platform", "linux/amd64"], {}),
        ([], {"DOCKER_DEFAULT_PLATFORM": "linux/amd64"}),
    ):
        assert warning not in succeeded(world.deploy("--dry-run", *args, env=env)).out
    world.constants["MACHINE"] = "x86_64"
    assert warning not in succeeded(world.deploy("--dry-run")).out


CUT = "The push refers to repository [api.example.com/shop]\n1a2b: Retrying in 1 second\n"


@pytest.mark.parametrize(
    "error", ["unexpected EOF", "write: broken pipe", "read: connection reset by peer"]
)
def test_a_push_of_the_cli_that_was_cut_is_repeated_once(world: World, error: str) -> None:
    cut: Any = {"status": 1, "err": f"{CUT}{error}\nERROR: exit status 1\n"}
    world.rules[EXTERNAL] = {"sequence": [cut, {"usual": True}]}
    ran = succeeded(world.deploy())
    assert len(world.commands(EXTERNAL)) == 2 and error in ran.out


@pytest.mark.parametrize("last", ["", "ERROR: exit status 1\n"])
def test_a_push_of_the_cli_that_is_cut_again_has_released_nothing(world: World, last: str) -> None:
    world.rules[EXTERNAL] = {"status": 1, "err": f"{CUT}unexpected EOF\n{last}"}
    ran = world.deploy()
    assert ran.status == 1 and len(world.commands(EXTERNAL)) == 2
    assert "\nNothing was released or promoted." in ran.err
    assert "CONVOX_HOST" not in ran.err and "may " not in ran.err


def test_another_failure_of_the_cli_is_not_repeated(world: World) -> None:
    world.rules[EXTERNAL] = {"status": 1, "err": "Step 1/2\nunexpected EOF\nERROR: exit status 1\n"}
    assert world.deploy().status == 1
    assert len(world.commands(EXTERNAL)) == 1


@pytest.mark.parametrize(
    ("context", "builder", "status"),
    [
        ("desktop-linux", "default", 1),
        ("default", "default", 0),
        ("desktop-linux", "", 0),
        ("desktop-linux", "desktop-linux", 0),
        ("desktop-linux", "farm", 0),
    ],
)
def test_the_stand_in_of_buildx_refuses_what_buildx_refuses(
    world: World, context: str, builder: str, status: int
) -> None:
    docker = world.write(
        "docker",
        f"""#!/bin/sh
case "$*" in
    "context inspect --format"*) echo {context} ;;
    "context inspect farm") exit 1 ;;
esac
""",
        0o755,
    )
    done = subprocess.run(
        [str(ROOT / "tests" / "standin-buildx"), "build", "."],
        env={"REAL_DOCKER": str(docker), "BUILDX_BUILDER": builder},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert ('to switch to context "default"' in done.stderr) == bool(status)


# --- 3: what docker itself would follow -----------------------------------------------

OF_DOCKER = [
    *("PATH", "HOME", "TMPDIR", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DOCKER_HOST", "DOCKER_CONFIG"),
    *("BUILDX_BUILDER", "BUILDKIT_HOST", "SSL_CERT_FILE", "HTTPS_PROXY", "no_proxy", "all_proxy"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONFIG_FILE"),
]


@pytest.mark.parametrize(
    ("name", "default"),
    paired([name for name in OF_DOCKER if name != "BUILDKIT_HOST"], ["", "=default"]),
)
def test_docker_never_follows_the_apps_values(world: World, name: str, default: str) -> None:
    world.write("Dockerfile", f"FROM scratch\nARG {name}{default}\n")
    env = {"STANDIN_APP_ENV": f"{name}=of-the-app"}
    refused(world, world.deploy(env=env), f"ARG {name}: ", f"`-- --build-arg {name}=VALUE`")
    succeeded(world.deploy("--", "--build-arg", f"{name}=mine", env=env))
    assert world.call(BUILD).env.get(name) == world.env.get(name)


@pytest.mark.parametrize("name", ["DOCKER_HOST", "HTTPS_PROXY"])
def test_a_value_in_args_is_a_way_out(world: World, name: str) -> None:
    world.write("Dockerfile", f"FROM scratch\nARG {name}\n")
    write(world, f"{{web: {{build: {{path: ., args: [{name}=mine]}}}}}}")
    succeeded(world.deploy(env={"STANDIN_APP_ENV": f"{name}=of-the-app"}))
    assert f"--build-arg {name}=mine" in world.call(BUILD).line


@pytest.mark.parametrize("name", ["AWS_REGION", "MY_PATH", "HOMEPAGE", "DOCKERIZED", "PROXY_URL"])
def test_similar_names_are_the_apps_own(world: World, name: str) -> None:
    world.write("Dockerfile", f"FROM scratch\nARG {name}\n")
    succeeded(world.deploy(env={"STANDIN_APP_ENV": f"{name}=of-the-app"}))
    assert world.call(BUILD).env[name] == "of-the-app"


def test_only_values_of_the_app_are_refused(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG DOCKER_HOST\nARG PATH=/bin\n")
    succeeded(world.deploy(env={"STANDIN_APP_ENV": "KEY=value"}))


# --- 4: the cause of a failed build, of a hook and of a push ---------------------------

THREE = "{web: {build: .}, api: {build: api}, job: {build: job}}"
LOG = [f"#{number} line" for number in range(1, 28)]


def test_a_failed_build_among_several_shows_its_cause(world: World) -> None:
    """BuildKit prints the cause, and after it the place in the Dockerfile."""
    write(world, THREE)
    for path in ("api/Dockerfile", "job/Dockerfile"):
        world.write(path, "FROM scratch\n")
    log = [*LOG[:19], "ERROR: the cause", *LOG[20:]]
    world.rules[BUILD] = {
        "words": {
            "api": {"status": 1, "once": BUILD, "times": 3, "err": "\n".join(log) + "\n"},
            ".": {"out": "of another\n", "hang": True},
            "job": {"out": "of another\n", "hang": True},
        }
    }
    env = {"STANDIN_BUILDKIT": "1", "GITHUB_ACTIONS": "true"}
    ran = world.deploy("--result", "result.json", env=env)
    assert ran.status == 1, ran.text
    [annotation] = [line for line in ran.out.splitlines() if line.startswith("::error ")]
    for text in (result(world)["error"], annotation.replace("%0A", "\n")):
        quoted = [line[4:] for line in text.splitlines() if line.startswith("  > ")]
        assert quoted == log[-20:] and "of another" not in text
    assert result(world)["failed_service"] == "api"


@pytest.mark.parametrize("command", ["before_build", BUILD, "after_build", "before_release"])
def test_the_last_lines_of_a_hook_and_of_a_build_are_quoted(world: World, command: str) -> None:
    world.add_hooks()
    world.rules[command] = {
        "status": 3,
        "out": "\n".join(LOG),
        "err": "\n\x1b[31mthe cause\x1b[0m\n",
    }
    ran = world.deploy("--result", "result.json", env={"GITHUB_ACTIONS": "true"})
    assert ran.status == 1
    for text in (result(world)["error"], ran.out[ran.out.index("::error ") :]):
        assert "the cause" in text and LOG[-1] in text and LOG[0] + "\n" not in text
    assert "\n".join(LOG) in ran.out  # all of it, as it is


def test_the_output_of_a_hook_is_copied_byte_for_byte(world: World) -> None:
    script = (
        r"#!/bin/sh"
        + "\n"
        + r"printf 'a\r50%%\r\033[31mred\033[0m\t\377\000 ::notice::x\nno newline'"
    )
    world.write("deploy/before_build.sh", script + "\n", 0o755)
    read_end, write_end = os.pipe()
    process = world.start(stdout=write_end)
    os.close(write_end)
    with open(read_end, "rb") as out:
        written = out.read()
    assert ended(process).status == 0
    assert b"a\r50%\r\033[31mred\033[0m\t\377\000 ::notice::x\nno newline" in written


def test_on_a_terminal_a_hook_writes_to_it(world: World) -> None:
    script = "#!/bin/sh\n[ -t 1 ] && [ -t 2 ] && echo on a terminal\n"
    world.write("deploy/before_build.sh", script, 0o755)
    assert "\non a terminal\n" in on_a_terminal(world)


@pytest.mark.parametrize("what", ["keeps writing", "is silent"])
def test_a_daemon_of_a_hook_delays_nothing(world: World, what: str) -> None:
    """It keeps the pipe open that the hook's output is copied through."""
    world.add_hooks("before_build")
    world.rules["before_build"] = {"out": "started\n", "daemon": what}
    with (world.home / "log").open("w") as log:
        assert ended(world.start(stdout=log, stderr=log)).status == 0
    assert "\nstarted\n" in (world.home / "log").read_text()


@pytest.mark.parametrize(
    ("error", "said", "unsaid"),
    [
        ("write /var/lib/docker/x: no space left on device", "no space left", "log docker in"),
        ("x509: certificate signed by unknown authority", "certificate", "log docker in"),
        ("pull access denied for base, repository does not exist", "log docker in", "certificate."),
    ],
)
def test_the_advice_is_about_the_cause(world: World, error: str, said: str, unsaid: str) -> None:
    world.rules[BUILD] = {"status": 1, "err": f"{error}\n"}
    ran = world.deploy()
    assert ran.status == 1 and said in ran.text and unsaid not in ran.text


@pytest.mark.parametrize(
    "error",
    [
        "name unknown: The repository with name 'shop' does not exist in the registry with id '1'",
        "error from registry: The repository with name 'shop' does not exist in the registry",
        "name unknown: repository name not known to registry",
        "repository name not known to registry",
    ],
)
def test_a_missing_repository_is_understood_from_any_store(world: World, error: str) -> None:
    with_tag(world)
    world.rules["docker push"] = {"sequence": [{"status": 1, "err": error}, {"usual": True}]}
    ran = succeeded(world.deploy())
    assert len(world.commands("aws ecr create-repository")) == 1
    assert "Trying once more" not in ran.out


@pytest.mark.parametrize(
    "args",
    [
        ["--push"],
        ["--output", "type=oci,dest=x"],
        ["--output=type=cacheonly"],
        ["-o", "out"],
        ["-oout"],
        ["--pull", "--push"],
    ],
)
def test_an_output_that_cannot_work_is_refused_before_the_build(
    world: World, args: list[str]
) -> None:
    refused(world, world.deploy("--", *args))


def test_the_image_id_of_podman_has_no_prefix(world: World) -> None:
    with_tag(world)
    succeeded(world.deploy(env={"STANDIN_IMAGE_ID": IMAGE_ID.partition(":")[2]}))
    assert world.commands("docker push")[0].endswith(f"-{SHORT_ID}")


# --- 5: build arguments of several images ---------------------------------------------


def test_service_stands_for_the_first_service_of_each_image(world: World) -> None:
    write(world, "{web: {build: .}, clock: {}, api: {build: api}}")
    world.write("api/Dockerfile", "FROM scratch\n")
    cache = "--cache-to=type=registry,ref=r.io/cache:{service}"
    succeeded(world.deploy("--", cache, "--metadata-file", "{service}.json"))
    assert [line.split()[4:] for line in world.commands(BUILD)] == [
        [cache.format(service=name), "--metadata-file", f"{name}.json", path]
        for name, path in (("web", "."), ("api", "api"))
    ]


# --- 6, 7: logins ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [1, 2])
@pytest.mark.parametrize("dockerfile", ["FROM scratch\n", "FROM scratch\nARG KEY\n"])
def test_a_deploy_key_without_a_role_is_found_before_the_build(
    world: World, dockerfile: str, status: int
) -> None:
    world.write("Dockerfile", dockerfile)
    for command in (ENV, "convox api get /apps/shop/releases", EXTERNAL):
        world.rules[command] = {"status": status, "err": KEY}
    refused(world, world.deploy(), "deploy key", "role", "login", "tag TAG")


def test_a_deploy_key_can_deploy_images_of_a_registry(world: World) -> None:
    """What it cannot do is said where it matters: it cannot roll back."""
    with_tag(world)
    for command in (ENV, "convox api get /apps/shop/releases"):
        world.rules[command] = {"status": 1, "err": KEY}
    ran = succeeded(world.deploy())
    assert (
        "To roll back to ROLDRELEASE, use a login that is allowed to, and run the same command"
        in ran.out
    )


@pytest.mark.parametrize("host", ["localhost:5000", "registry.example.com", "ghcr.io"])
def test_no_login_to_a_plain_registry_is_a_warning(world: World, host: str) -> None:
    with_tag(world, f"{host}/team/shop")
    ran = succeeded(world.deploy("--dry-run"))
    assert f"\nwarning: docker has no login to {host}. " in ran.out
    assert f": docker login {host}\n" in ran.out


@pytest.mark.parametrize(
    "config",
    [
        '{"auths": {"ghcr.io": {}}}',
        '{"credsStore": "desktop"}',
        '{"credHelpers": {"ghcr.io": "x"}}',
    ],
)
def test_a_login_or_a_helper_is_no_reason_to_warn(world: World, config: str) -> None:
    with_tag(world, "ghcr.io/team/shop")
    (world.home / ".docker").mkdir()
    (world.home / ".docker" / "config.json").write_text(config)
    assert "warning" not in succeeded(world.deploy("--dry-run")).out
    other = {"DOCKER_CONFIG": str(world.home / "other")}
    assert "no login to ghcr.io" in world.deploy("--dry-run", env=other).out


def test_ecr_is_logged_in_to(world: World) -> None:
    with_tag(world)
    assert "has no login" not in succeeded(world.deploy()).out


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_that_are_part_of_the_password_are_named(world: World, quote: str) -> None:
    env = {"CONVOX_PASSWORD": f"{quote}secret-word{quote}"}
    refused(world, world.deploy(env=env), "CONVOX_PASSWORD is in quotes that are part of it.")


@pytest.mark.parametrize("space", [" secret-word", "secret-word\n"])
def test_whitespace_in_the_password_is_named(world: World, space: str) -> None:
    refused(world, world.deploy(env={"CONVOX_PASSWORD": space}), "whitespace or a newline")


def test_git_is_optional_where_no_tag_is_made(world: World) -> None:
    (world.bin / "git").unlink()
    ran = succeeded(world.deploy())
    assert "\nwarning: Cannot run git: " in ran.out
    with_tag(world)
    ran = world.deploy()
    assert ran.status == 2 and "Cannot run git: " in ran.err


@pytest.mark.parametrize("text", ["no racks found, try `convox login`", "no current rack, use `x`"])
def test_without_a_current_rack_one_is_to_be_chosen(world: World, text: str) -> None:
    world.rules["convox api get"] = {"status": 1, "err": f"ERROR: {text}\n"}
    env = {"CONVOX_HOST": None, "CONVOX_PASSWORD": None}
    refused(world, world.deploy(env=env), "`convox switch <rack>`")


def test_more_than_a_password_from_aws_is_said(world: World) -> None:
    """aws in a container that was given a terminal."""
    with_tag(world)
    world.rules["aws"] = {"out": "\x1b[?1h\x1b=\rTOKEN-OF-ECR\r\n\x1b[?1l\x1b>"}
    ran = world.deploy()
    refused(world, ran, "printed more than a password. Run it without a terminal")
    assert "TOKEN-OF-ECR" not in ran.text


# --- 8: what Convox would read differently --------------------------------------------


@pytest.mark.parametrize(
    ("before", "services"),
    [
        ("x-base: &base {build: api}\n", "{web: {<<: *base}}"),
        ("x-base: &base {image: redis}\n", "{web: {<<: [*base], port: 80}}"),
        ("x-base: &base {api: {build: api}}\n", "{<<: *base, web: {build: .}}"),
        ("x-base: &base {path: api}\n", "{web: {build: {<<: *base}}}"),
    ],
)
def test_a_merge_key_that_brings_what_is_built_is_an_error(
    world: World, before: str, services: str
) -> None:
    write(world, services, before)
    refused(world, world.deploy(), "convox.yml: service ", "Convox ignores ")
    assert world.calls == []


@pytest.mark.parametrize(
    ("services", "names"),
    [
        ("{web: {<<: *base, build: .}}", "port"),
        ("{web: {build: ., health: {<<: *base}}}", "port"),
        ("{web: {build: ., <<: [*base, {scale: 2, port: 1}]}}", "port, scale"),
    ],
)
def test_another_merge_key_is_a_warning_that_names_what_is_lost(
    world: World, services: str, names: str
) -> None:
    write(world, services, BASE)
    ran = succeeded(world.deploy())
    assert f"\nwarning: service web: Convox ignores merge keys (<<): {names}\n" in ran.out


def test_a_merge_key_whose_keys_are_all_written_out_is_no_warning(world: World) -> None:
    write(world, "{web: {<<: *base, build: ., port: 1}}", BASE)
    assert "warning" not in succeeded(world.deploy()).out


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_in_a_compose_file_merge_keys_and_mappings_are_normal(world: World, cli: str) -> None:
    before = f"x-base: &base {{image: '{ECR}/shop:TAG', environment: {{A: b}}}}\n"
    services = "{web: {<<: *base, build: {context: ., args: {B: c}}}}"
    write(world, services, before, "docker-compose.yml")
    ran = world.deploy("-m", "docker-compose.yml", env={"CONVOX_STANDIN_CLI": cli})
    # A v3 CLI reads it as a convox.yml.
    lost = "warning: service web: Convox ignores merge keys (<<): environment, image\n"
    assert succeeded(ran).out.count("warning: ") == ran.out.count(lost) == (cli == "v3")
    assert "--build-arg B=c" in world.call(BUILD).line


@pytest.mark.parametrize("name", ["convox.yml", "docker-compose.yml"])
@pytest.mark.parametrize("args", ["FOO=bar", "1"])
def test_args_as_a_string_are_an_error_everywhere(world: World, args: str, name: str) -> None:
    image = f"image: '{ECR}/shop:TAG', " if "compose" in name else ""
    write(world, f"{{web: {{{image}build: {{args: {args}}}}}}}", name=name)
    refused(world, world.deploy("-m", name), "build.args must be a list")


@pytest.mark.parametrize(
    ("services", "before"),
    [
        ("{web: {build: {args: {A: b}}}}", ""),
        ("{web: {build: ., environment: {A: b}}}", ""),
        ("{web: {image: redis, environment: {A: b}}}", ""),
        ("{web: {build: ., environment: A=b}}", ""),
        ("{web: {build: .}}", "environment: {A: b}\n"),
    ],
)
def test_in_a_convox_yml_lists_must_be_lists(world: World, services: str, before: str) -> None:
    write(world, services, before)
    refused(world, world.deploy(), "convox.yml: ", " must be a list, with lines such as `- NAME=")


@pytest.mark.parametrize("name", ["my_web", "Web", "1web", "-web", "web.1"])
def test_a_name_that_v3_refuses_is_an_error(world: World, name: str) -> None:
    write(world, f"{{{name}: {{build: .}}}}")
    refused(world, world.deploy(), f"convox.yml: service {name}: ", "in its name")


def test_services_at_the_top_level_are_an_error_with_v3(world: World) -> None:
    """The rack would see none, and remove what runs."""
    image = f"{ECR}/shop:TAG"
    world.write("docker-compose.yml", f"web: {{image: '{image}', build: .}}\n")
    named = ["-m", "docker-compose.yml"]
    refused(world, world.deploy(*named), "Move them under `services:`.")
    succeeded(world.deploy(*named, env={"CONVOX_STANDIN_CLI": "v2"}))


@pytest.mark.parametrize("text", ["", "services:\n", "services: []\n", "services: {}\n"])
def test_a_manifest_without_services_is_an_error(world: World, text: str) -> None:
    (world.app / "Dockerfile").unlink()
    world.write("convox.yml", text)
    refused(world, world.deploy(), "there is nothing to build: no services.")


def test_an_argument_without_a_value_does_not_hide_the_apps_own(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_URL=http://localhost\n")
    write(world, "{web: {build: {path: ., args: [API_URL]}}}")
    succeeded(world.deploy(env={"STANDIN_APP_ENV": "API_URL=https://api.example.com"}))
    call = world.call(BUILD)
    assert call.line.endswith(" --build-arg API_URL .")
    assert call.env["API_URL"] == "https://api.example.com"


@pytest.mark.parametrize(
    "image", ["redis:${VERSION}", "${REGISTRY}/redis:7", "$IMAGE", "r.io/x:$V"]
)
def test_an_image_of_variables_is_third_party(world: World, image: str) -> None:
    write(world, f"{{web: {{build: .}}, db: {{image: '{image}'}}}}")
    succeeded(world.deploy())
    assert len(world.commands(BUILD)) == 1


def test_a_git_context_with_a_dockerfile_is_file(world: World) -> None:
    url = "https://example.com/app.git#main"
    build = f"build: {{context: '{url}', dockerfile: docker/D}}"
    write(world, f"{{web: {{image: '{ECR}/shop:TAG', {build}}}}}", name="docker-compose.yml")
    succeeded(world.deploy("-m", "docker-compose.yml"))
    assert world.call(BUILD).argv[4:] == ["--file", "docker/D", url]


# --- 9: variables that the app must have ----------------------------------------------


@pytest.mark.parametrize("args", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("before", "services"),
    [
        ("", "{web: {build: ., environment: [NEEDED, A=1, KEY, '*', EMPTY=]}}"),
        ("environment: [NEEDED, KEY]\n", "{web: {build: .}}"),
        ("", "{web: {build: .}, db: {image: redis, environment: [NEEDED]}}"),
        ("environment: [NEEDED]\n", "{db: {image: redis}}"),
    ],
)
def test_a_variable_that_the_app_lacks_is_found_in_preflight(
    world: World, before: str, services: str, args: list[str]
) -> None:
    write(world, services, before)
    if "build" not in services:
        (world.app / "Dockerfile").unlink()
    ran = world.deploy(*args, env={"STANDIN_APP_ENV": "KEY=x"})
    refused(
        world, ran, "The app has no value for NEEDED. ", "`convox env set NAME=VALUE --app shop`"
    )
    world.env["STANDIN_APP_ENV"] = "KEY=x\nNEEDED="
    succeeded(world.deploy(*args))


def test_where_before_build_can_set_them_the_check_comes_after_it(world: World) -> None:
    write(world, "{web: {build: ., environment: [NEEDED]}}")
    world.add_hooks("before_build")
    world.rules[ENV] = {"sequence": [{"out": "KEY=x\n"}, {"out": "NEEDED=1\n"}]}
    ran = succeeded(world.deploy())
    assert ran.out.count("\nwarning: The app has no value for NEEDED. ") == 1
    assert len(world.commands(ENV)) == 2
    world.rules[ENV] = {"out": "KEY=x\n"}
    builds = world.commands(BUILD)
    ran = world.deploy()
    assert ran.status == 1 and "build failed:\nThe app has no value for NEEDED." in ran.err
    assert world.commands(BUILD) == builds


def test_a_value_that_before_build_sets_is_the_builds(world: World) -> None:
    write(world, "{web: {build: .}}")
    world.write("Dockerfile", "FROM scratch\nARG API_URL=x\n")
    world.add_hooks("before_build")
    world.rules[ENV] = {"sequence": [{"out": "API_URL=old\n"}, {"out": "API_URL=new\n"}]}
    succeeded(world.deploy())
    assert world.call(BUILD).env["API_URL"] == "new"


def test_required_variables_may_be_in_a_list_of_an_alias(world: World) -> None:
    """Convox flattens it, and ignores what is not a string."""
    write(
        world, "{web: {build: ., environment: [*shared, C, {X: y}]}}", "x-env: &shared [A, B=1]\n"
    )
    refused(world, world.deploy(env={"STANDIN_APP_ENV": "A=1"}), "The app has no value for C. ")
    succeeded(world.deploy(env={"STANDIN_APP_ENV": "A=1\nC=2"}))


def test_an_environment_that_cannot_be_read_is_no_reason_to_stop(world: World) -> None:
    with_tag(world, more=", environment: [NEEDED]")
    world.rules[ENV] = {"status": 1, "err": "ERROR: forbidden\n"}
    succeeded(world.deploy())


# --- 10: apps that build nothing -------------------------------------------------------


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_an_app_that_builds_nothing_is_deployed(world: World, cli: str) -> None:
    write(world, "{db: {image: 'postgres:16'}, web: {image: 'r.io/shop:1.2'}}")
    (world.app / "Dockerfile").unlink()
    world.add_hooks()
    ran = succeeded(world.deploy(env={"CONVOX_STANDIN_CLI": cli}))
    assert "builds nothing" in ran.out and "images from elsewhere: 2" in ran.out
    assert [call.argv[0] for call in world.calls if "_" in call.argv[0]] == [
        *("before_build", "after_build", "before_release"),
    ]
    assert "\nVerified: " in ran.out and world.running == "RNEWRELEASE"
    assert world.call("convox build --app").upload == {
        "convox.yml": (world.app / "convox.yml").read_text()
    }


def test_an_app_that_builds_nothing_needs_neither_docker_nor_aws(world: World) -> None:
    write(world, "{db: {image: 'postgres:16'}}")
    for path in (world.app / "Dockerfile", world.bin / "docker", world.bin / "aws"):
        path.unlink()
    succeeded(world.deploy())


@pytest.mark.parametrize("tag", ["$TAG", "${TAG}", "tag", "${TAG:-latest}"])
def test_a_tag_in_another_spelling_is_a_likelier_mistake(world: World, tag: str) -> None:
    (world.app / "Dockerfile").unlink()
    write(world, f"{{web: {{image: 'r.io/shop:{tag}'}}}}")
    refused(world, world.deploy(), "Set image: r.io/shop:TAG")


def test_a_dockerfile_in_the_root_is_a_likelier_mistake(world: World) -> None:
    write(world, "{web: {image: 'r.io/shop:1.2'}}")
    refused(world, world.deploy(), "nothing to build: web (r.io/shop:1.2). Add `build: .`")


def test_a_compose_file_that_nobody_named_is_a_likelier_mistake(world: World) -> None:
    for name in ("Dockerfile", "convox.yml"):
        (world.app / name).unlink()
    write(world, "{db: {image: 'postgres:16'}}", name="docker-compose.yml")
    refused(world, world.deploy(), "-m docker-compose.yml")
    succeeded(world.deploy("-m", "docker-compose.yml"))
    succeeded(world.deploy(env={"DOCKER_COMPOSE": "docker-compose.yml"}))
    succeeded(world.deploy(env={"CONVOX_STANDIN_CLI": "v2"}))


# --- 11: where the app and the manifest are --------------------------------------------


@pytest.mark.parametrize(("path", "cli"), [(".convox/app", "v3"), (".convox2/app", "v2")])
def test_the_app_is_the_one_that_the_convox_cli_would_take(
    world: World, path: str, cli: str
) -> None:
    world.app = world.app.rename(world.home / "shop-staging")
    with_tag(world)
    world.write(path, "shop\n")
    env = {"APP_NAME": None, "CONVOX_STANDIN_CLI": cli}
    ran = succeeded(world.deploy(env=env))
    assert f"\nDeploying shop ({path}) " in ran.out
    assert " --app shop " in world.call("convox build --app").line
    ran = succeeded(world.deploy(env={**env, "CONVOX_APP": "other"}))
    assert "\nDeploying other (CONVOX_APP) " in ran.out
    assert "\nDeploying mine (--app) " in succeeded(world.deploy("-a", "mine", env=env)).out


@pytest.mark.parametrize("name", ["convox.yaml", "compose.yaml", "compose.yml"])
def test_a_file_that_is_nearly_a_manifest_is_named(world: World, name: str) -> None:
    (world.app / "convox.yml").rename(world.app / name)
    refused(world, world.deploy(), f"Do you mean {name}? Add: -m {name}\n")


def test_the_manifest_of_the_parent_directory_is_named(world: World) -> None:
    (world.app / "src").mkdir()
    ran = world.deploy(cwd=world.app / "src")
    refused(world, ran, "../convox.yml is there. Run this in the parent directory.")


def test_compose_v1_without_an_image_gets_one_message(world: World) -> None:
    (world.app / "convox.yml").unlink()
    world.write("docker-compose.yml", "web:\n  build: .\n")
    for cli in ("v2", "v3"):
        ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
        line = "Add this line: image: <account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
        refused(world, ran, "preflight failed:\ndocker-compose.yml: service web: ", f"{line}\n")


# --- 12: options ----------------------------------------------------------------------


def test_short_options_are_those_of_the_convox_cli(world: World) -> None:
    (world.app / "convox.yml").rename(world.app / "other.yml")
    env = {"CONVOX_HOST": None, "CONVOX_PASSWORD": None, "APP_NAME": None}
    ran = succeeded(world.deploy("-a", "other", "-r", "prod", "-m", "other.yml", env=env))
    assert "\nDeploying other (--app) " in ran.out and " on prod (--rack)\n" in ran.out
    assert f"{EXTERNAL} --app other --rack prod --manifest other.yml" in world.call(EXTERNAL).line


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--app-name", "--app"),
        ("--manifest", ""),
        ("--dryrun", "--dry-run"),
        ("--roll-back", "--rollback"),
    ],
)
def test_a_misspelled_option_gets_suggestions(world: World, wrong: str, right: str) -> None:
    refused(world, ran := world.deploy(wrong, "x"), "No such option", right)
    assert "after" not in ran.err


@pytest.mark.parametrize(
    "option", ["--no-cache", "--build-arg", "--platform", "--secret", "-f", "-t"]
)
def test_only_docker_builds_options_belong_after_the_dashes(world: World, option: str) -> None:
    refused(world, world.deploy(option, "x"), f"Put {option} after `--`.")


# --- 13: hooks and the commit ----------------------------------------------------------

HOOKS = ["before_build", "after_build", "before_release"]


@pytest.mark.parametrize(
    ("explained", "hook"),
    paired(
        [
            ("#!/bin/sh\r\nexit 0\r\n", "has CRLF line ends. Run: sed -i.bak 's/\\r$//' {path}\n"),
            ("#!/usr/bin/env bash\r\n", "has CRLF line ends. "),
            ("exit 0\n", "must start with a line such as #!/bin/sh.\n"),
            ("", "must start with a line such as #!/bin/sh.\n"),
            ("#!/no/such/shell\n", "needs /no/such/shell, which is not installed here.\n"),
            ("#!/usr/bin/env fish\n", "needs fish, which is not installed here.\n"),
            (
                "#! /usr/bin/no-python -u\n",
                "needs /usr/bin/no-python, which is not installed here.\n",
            ),
        ],
        HOOKS,
    ),
)
def test_a_hook_that_cannot_start_is_found_in_preflight(
    world: World, explained: tuple[str, str], hook: str
) -> None:
    text, why = explained
    path = f"deploy/{hook}.sh"
    world.write(path, text, 0o755)
    refused(world, world.deploy(), f"{path} {why.format(path=path)}")


@pytest.mark.parametrize("text", ["#!/bin/sh\n", "#! /bin/sh -eu\n", "#!/usr/bin/env -S sh -e\n"])
def test_a_hook_that_can_start_is_started(world: World, text: str) -> None:
    world.write("deploy/after_build.sh", f"{text}echo started\n", 0o755)
    world.env["PATH"] += ":/usr/bin:/bin"
    assert "\nstarted\n" in succeeded(world.deploy()).out


def test_a_hook_can_be_a_program(world: World) -> None:
    world.write("deploy/after_build.sh", Path("/bin/true").read_bytes(), 0o755)
    succeeded(world.deploy())


def test_a_hook_that_changes_the_commit(world: World) -> None:
    """git is read again, as the manifest is."""
    with_tag(world)
    script = f"""#!/bin/sh
echo 1 >version
{REAL_GIT} add version
{REAL_GIT} -c user.name=t -c user.email=t@localhost commit --quiet -am "Version 1"
"""
    world.write("deploy/before_build.sh", script, 0o755)
    (world.app / "deploy" / "after_build.sh").symlink_to(ROOT / "tests" / "standin")
    succeeded(world.deploy())
    words = [REAL_GIT, "rev-parse", "HEAD"]
    head = subprocess.check_output(words, cwd=world.app, text=True).strip()
    assert world.call("after_build").env["GIT_HASH"] == head
    assert "Version 1" in world.call("after_build").env["GIT_DESCRIPTION"]
    assert f":{head[:7]}-{SHORT_ID}" in world.commands("docker push")[0]


@pytest.mark.parametrize(
    ("variable", "has_head"),
    paired(["CI_COMMIT_REF_NAME", "CIRCLE_TAG", "BITBUCKET_TAG", "TAG_NAME"], [True, False]),
)
def test_the_branch_of_a_detached_head_is_what_ci_says(
    world: World, variable: str, has_head: bool
) -> None:
    """Also where someone has made a branch called HEAD."""
    if has_head:
        git(world, "update-ref", "refs/heads/HEAD", "HEAD")
    git(world, "checkout", "--quiet", "--detach")
    world.add_hooks("after_build")
    succeeded(world.deploy(env={variable: "v1"}))
    assert world.call("after_build").env["GIT_BRANCH"] == "v1"


def test_a_branch_called_head_is_no_bug(world: World) -> None:
    git(world, "update-ref", "refs/heads/HEAD", "HEAD")
    git(world, "checkout", "--quiet", "--detach")
    world.add_hooks("after_build")
    succeeded(world.deploy())
    assert world.call("after_build").env["GIT_BRANCH"] == ""


def test_a_submodule_that_is_not_checked_out_is_a_warning(world: World) -> None:
    sub = world.home / "sub"
    subprocess.run([REAL_GIT, "init", "--quiet", str(sub)], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    commit = [*identity, "commit", "--quiet", "--allow-empty", "--message", "x"]
    subprocess.run([REAL_GIT, "-C", str(sub), *commit], check=True)
    git(world, "-c", "protocol.file.allow=always", "submodule", "add", "--quiet", str(sub), "lib")
    git(world, "commit", "--quiet", "--all", "--message", "lib")
    world.env["PATH"] += ":/usr/bin:/bin"  # git's submodule command is a script
    assert "A submodule" not in succeeded(world.deploy()).out
    git(world, "submodule", "deinit", "--force", "lib")
    ran = succeeded(world.deploy())
    assert ran.out.count("\nwarning: A submodule is not checked out. Run: git submodule ") == 1


def test_the_example_migration_fails_without_its_marker(world: World) -> None:
    """Older CLIs exit with 0 where the stream of `convox run` is lost."""
    script = (ROOT / "deploy" / "before_release.sh").read_text()
    world.write("deploy/before_release.sh", script, 0o755)
    world.env["PATH"] += ":/usr/bin:/bin"
    world.rules["convox run"] = {"out": "== AddIndex: migrating\n"}
    ran = world.deploy()
    assert ran.status == 1, ran.text
    assert "before_release failed:" in ran.err and world.running == "ROLDRELEASE"


# --- 14: what may not be meant ---------------------------------------------------------


def test_uncommitted_and_untracked_files_are_one_warning_on_a_terminal(world: World) -> None:
    warning = "warning: Uncommitted or untracked files are deployed, too.\n"
    git(world, "add", ".")
    assert warning not in on_a_terminal(world, NO_COLOR="1")
    world.write("Dockerfile", "FROM scratch\n# changed\n")
    world.write("untracked", "")
    assert on_a_terminal(world, NO_COLOR="1").count(warning) == 1
    assert warning not in succeeded(world.deploy()).out


# --- 15: what attacks found ------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGALRM])
def test_a_problem_is_shown_even_if_another_check_hangs(world: World, how: signal.Signals) -> None:
    world.rules["docker version"] = {"hang": True, "once": "convox api get"}
    world.rules["convox api get"] = {"status": 1, "err": "ERROR: app not found: shop\n"}
    args = ["--timeout", "0.02"] if how == signal.SIGALRM else []
    process = world.start(*args)
    world.await_hanging()
    if not args:
        assert has_ended(int(world.call("convox api get").pid))
        time.sleep(0.5)  # the tool notes it
        process.send_signal(how)
    ran = ended(process)
    assert ran.status == (124 if args else 128 + how)
    assert "docker version" in ran.err and "ERROR: app not found: shop" in ran.err


def test_names_that_a_signal_leaves_in_docker_are_named(world: World) -> None:
    world.rules["docker image rm"] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGTERM)
    [name] = world.call("docker image rm").argv[4:]
    assert f"Left in docker: {name}\n" in ran.err


@pytest.mark.parametrize("closed", ["1", "2", "1,2"])
def test_a_closed_output_is_said_where_it_can_be_said(world: World, closed: str) -> None:
    descriptors = [int(number) for number in closed.split(",")]

    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    ran = ended(world.start(preexec_fn=close))
    assert ran.status == 1 and "Traceback" not in ran.text
    assert world.commands(*CHANGES) == []
    assert 2 in descriptors or "stdout or stderr is closed." in ran.err


def test_a_closed_input_changes_nothing(world: World) -> None:
    with_tag(world)
    succeeded(ended(world.start(preexec_fn=lambda: os.close(0))))
    assert world.call("docker login").stdin == "token-of-ecr"


def test_an_argument_that_is_too_long_is_said_in_the_systems_words(world: World) -> None:
    ran = world.deploy("--", "--build-arg", f"KEY={'x' * 130 * 1024}")
    assert ran.status == 1 and "Traceback" not in ran.text
    assert "build failed:\nCannot run docker: Argument list too long." in ran.err
    assert len(ran.err) < 2000


def test_a_pipe_is_no_earlier_result(world: World) -> None:
    with_tag(world)
    os.mkfifo(world.app / "pipe")
    refused(world, world.deploy("--from", "pipe"), "--from pipe is not the --result of a deploy")


@pytest.mark.parametrize("text", ['{"quoted": "\\"tool\\": \\"convox-deploy\\""}', "notes\n", "[]"])
def test_a_file_of_the_user_is_no_result_to_replace(world: World, text: str) -> None:
    path = world.write("notes.json", text)
    refused(
        world, world.deploy("--result", "notes.json"), "would replace a file that is not a result"
    )
    assert path.read_text() == text


@pytest.mark.parametrize("before", ["", "  ", "fine\r", "\x1b[0m\r"])
def test_text_of_the_rack_is_no_command_of_github(world: World, before: str) -> None:
    text = f"{before}::error::from the rack\n##[error]x\n"
    world.rules["convox releases promote --app"] = {"usual": True, "err": text}
    ran = succeeded(world.deploy(env={"GITHUB_ACTIONS": "true"}))
    lines = [line.lstrip() for line in ran.out.replace("\r", "\n").splitlines()]
    assert not [line for line in lines if line.startswith(("::error", "##["))]
    assert "error::from the rack" in ran.out


@pytest.mark.parametrize("description", ["\x1b[2J\x07red\n::error::x", "a\r\nb\x9b31m"])
def test_control_characters_of_the_rack_are_cleaned(world: World, description: str) -> None:
    release = {"id": "RNEWERXXXXX", "created": "2026-11-03T00:00:00Z", "description": description}
    (world.home / "releases.json").write_text(json.dumps([release]))
    ran = succeeded(world.deploy(env={"NO_COLOR": "1"}))
    [line] = [line for line in ran.out.splitlines() if line.startswith("warning: RNEWERXXXXX")]
    assert line.endswith(" are not in RNEWRELEASE.")
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in line)


@pytest.mark.parametrize(
    ("url", "host", "is_same"),
    [
        ("https://convox:secret-word@Rack.Example.com/", "rack.example.com", True),
        ("https://convox:secret-word@rack.example.com", "RACK.example.com", True),
        ("https://convox:secret-word@rack.example.com:8443/path", "rack.example.com:8443", True),
        ("https://convox:secret-word@other.example.com", "rack.example.com", False),
        ("https://convox:secret-word@rack.example.com:8443", "rack.example.com", False),
    ],
)
def test_rack_url_and_convox_host_are_compared_as_hosts(
    world: World, url: str, host: str, is_same: bool
) -> None:
    ran = world.deploy(env={"RACK_URL": url, "CONVOX_HOST": host})
    assert ("name different racks" in ran.err) != is_same
    assert ran.status == (0 if is_same else 2), ran.text


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_docker_aws_and_git_do_not_get_the_login_to_the_rack(world: World, cli: str) -> None:
    with_tag(world)
    world.write("Dockerfile", "FROM scratch\nARG KEY\n")
    world.add_hooks()
    succeeded(world.deploy(env={"CONVOX_STANDIN_CLI": cli, "STANDIN_APP_ENV": "KEY=x"}))
    programs = {"docker", "aws", "git"}
    assert {call.argv[0] for call in world.calls} >= programs
    for call in world.calls:
        has_login = {"CONVOX_PASSWORD", "RACK_URL"} & call.env.keys()
        assert bool(has_login) != (call.argv[0] in programs), call.line


# --- what someone else does meanwhile --------------------------------------------------


def test_the_way_back_is_what_ran_right_before_the_promote(world: World) -> None:
    """Someone else's release goes live during our build."""
    world.write("deploy/after_build.sh", '#!/bin/sh\necho RTHEIRSXXXX >"$STANDIN/running"\n', 0o755)
    ran = succeeded(world.deploy("--result", "result.json"))
    assert "--rollback RTHEIRSXXXX (or DEPLOY_ROLLBACK=RTHEIRSXXXX).\n" in ran.out
    assert result(world)["running_before"] == "RTHEIRSXXXX"


@pytest.mark.parametrize(
    "error", ["release not found: RNOSUCHONE", 'release.convox.com "rnosuchone" not found']
)
@pytest.mark.parametrize("option", ["--release", "--rollback"])
def test_an_unknown_release_is_found_before_any_hook(world: World, option: str, error: str) -> None:
    world.add_hooks()
    command = "convox api get /apps/shop/releases/RNOSUCHONE"
    world.rules[command] = {"status": 1, "err": f"ERROR: {error}\n"}
    ran = world.deploy(option, "RNOSUCHONE")
    refused(
        world, ran, "There is no release RNOSUCHONE. To list them: `convox releases --app shop`"
    )
    assert world.commands("before_", "after_") == []


# --- the ends of hooks, results, names and secrets -------------------------------------


def test_what_still_comes_through_a_hooks_pipe_is_shown_and_quoted(world: World) -> None:
    """A filter of the hook's own output outlives the hook for a moment."""
    script = """#!/bin/bash
exec > >(while read -r line; do echo "[mig] $line"; done) 2>&1
for i in $(seq 300); do echo "line $i"; done
echo "ERROR the cause"
exit 3
"""
    world.write("deploy/before_build.sh", script, 0o755)
    world.env["PATH"] += ":/usr/bin:/bin"
    world.constants["DRAIN_SECONDS"] = 20
    ran = world.deploy()
    assert ran.status == 1 and ran.out.count("[mig] line ") == 300
    assert ran.text.count("[mig] ERROR the cause\n") == 1


def test_a_hook_that_ends_in_the_middle_of_a_line_hides_no_command_of_github(world: World) -> None:
    world.rules["before_build"] = {"out": "partial"}
    world.add_hooks("before_build")
    ran = world.deploy(env={"GITHUB_ACTIONS": "true"})
    assert "partial\n::endgroup::\n" in ran.out


def test_a_result_may_be_named_with_a_slash_at_its_end(world: World) -> None:
    assert world.deploy("--result", "out/").status == 0
    assert '"status": "succeeded"' in (world.app / "out").read_text()


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n"])
def test_an_empty_convox_app_is_none(world: World, content: bytes) -> None:
    world.write(".convox/app", content)
    ran = world.deploy(env={"APP_NAME": None})
    assert ran.status == 0 and "Deploying shop (directory name)" in ran.out


def test_a_secret_among_the_build_arguments_is_redacted(world: World) -> None:
    ran = world.deploy("--", "--build-arg", "NPM_TOKEN=abcdefgh12345")
    assert ran.status == 0 and "abcdefgh12345" not in ran.text
    assert "--build-arg NPM_TOKEN=abcdefgh12345" in world.call(BUILD).line


def test_a_hook_may_set_variables_in_its_first_line(world: World) -> None:
    world.env["PATH"] += ":/usr/bin:/bin"
    world.write("deploy/before_build.sh", "#!/usr/bin/env -S LC_ALL=C sh\necho fine\n", 0o755)
    assert "\nfine\n" in succeeded(world.deploy()).out
