"""Errors that users have reported in public: the advice that fits, and texts that must not get it."""

from __future__ import annotations

import json
import re

import pytest
from conftest import COMPOSE, ECR, World
from standin import Rule

from convox_deploy import CommandFailed

VERSION, PASSWORD, LOGIN = "docker version", "aws ecr get-login-password", "docker login"
BUILD = "docker build --tag"
PUSH, RELEASE, PROMOTE = "docker push", "convox build --app", "convox releases promote --app"
ASK = "convox api get"
CREATE = "aws ecr create-repository"
EXISTS: Rule = {"status": 254, "err": "An error occurred (RepositoryAlreadyExistsException)\n"}
STORE = "Error saving credentials: error storing credentials - err:"
DENIED = "arn:aws:sts::123456789012:assumed-role/ci/x is not authorized to perform:"

REPORTS = [  # the command, what it printed, and a fragment of the advice
    # docker
    (
        VERSION,
        "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: Get"
        ' "http://%2Fvar%2Frun%2Fdocker.sock/v1.50/version": dial unix /var/run/docker.sock: connect: permission denied',
        "restart the agent",
    ),
    (
        VERSION,
        "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock",
        "usermod -aG docker",
    ),
    (
        VERSION,
        "Error response from daemon: client version 1.40 is too old. Minimum supported API version is 1.44, please"
        " upgrade your client to a newer version",
        "DOCKER_API_VERSION",
    ),
    (
        VERSION,
        "Error response from daemon: client version 1.99 is too new. Maximum supported API version is 1.41",
        "DOCKER_API_VERSION",
    ),
    (
        VERSION,
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "Start Docker",
    ),
    (
        VERSION,
        "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct and if the"
        " daemon is running: dial unix /var/run/docker.sock: connect: no such file or directory",
        "Start Docker",
    ),
    (
        VERSION,
        'error during connect: Get "http://docker:2375/v1.50/version": dial tcp: lookup docker on 10.255.255.53:53: no'
        " such host",
        "docker:dind",
    ),
    (
        VERSION,
        'Failed to initialize: unable to resolve docker endpoint: context "gone": context not found: open'
        " /root/.docker/contexts/meta/x/meta.json: no such file or directory",
        "",  # docker's own words say it
    ),
    (
        VERSION,
        "Cannot connect to the Docker daemon at tcp://docker:2375. Is the docker daemon running?",
        "docker:dind",
    ),
    (
        VERSION,
        "unable to resolve docker endpoint: open /certs/client/ca.pem: no such file or directory",
        "DOCKER_CERT_PATH",
    ),
    (VERSION, "Client sent an HTTP request to an HTTPS server.", "DOCKER_HOST"),
    # aws
    (
        PASSWORD,
        "An error occurred (AccessDenied) when calling the AssumeRoleWithWebIdentity operation: Not"
        " authorized to perform sts:AssumeRoleWithWebIdentity",
        "trust policy",
    ),
    (
        PASSWORD,
        "An error occurred (InvalidIdentityToken) when calling the AssumeRoleWithWebIdentity operation: No"
        " OpenIDConnect provider found in your account",
        "trust policy",
    ),
    (
        PASSWORD,
        f"An error occurred (AccessDeniedException) when calling the GetAuthorizationToken operation: User: {DENIED}"
        " ecr:GetAuthorizationToken on resource: *",
        "lacks a permission",
    ),
    (
        PASSWORD,
        "An error occurred (InvalidSignatureException) when calling the GetAuthorizationToken operation: Signature"
        " expired: 20220127T001427Z is now earlier than 20220127T014428Z (20220127T015928Z - 15 min.)",
        "clock",
    ),
    (
        PASSWORD,
        'Connect timeout on endpoint URL: "https://api.ecr.us-west-2.amazonaws.com/"',
        "cannot reach ECR",
    ),
    (
        PASSWORD,
        'Could not connect to the endpoint URL: "https://api.ecr.us-east-1.amazonaws.com/"',
        "region",
    ),
    (PASSWORD, 'Failed to connect to proxy URL: "http://127.0.0.1:9"', "proxy"),
    (
        PASSWORD,
        "SSL validation failed for https://api.ecr.us-east-1.amazonaws.com/ [SSL: CERTIFICATE_VERIFY_FAILED]"
        " certificate verify failed",
        "proxy",
    ),
    (PASSWORD, "The config profile (nope) could not be found", "Set AWS_PROFILE"),
    (
        PASSWORD,
        "Error when retrieving token from sso: Token has expired and refresh failed",
        "aws sso login",
    ),
    (
        PASSWORD,
        "Error loading SSO Token: Token for https://x.awsapps.com/start does not exist",
        "aws sso login",
    ),
    (
        PASSWORD,
        "GetPassWarning: Can not control echo on the terminal.\nEnter MFA code for arn:aws:iam::123456789012:mfa/u: ",
        "MFA code",
    ),
    (
        PASSWORD,
        "An error occurred (ExpiredTokenException) when calling the GetAuthorizationToken operation: The security token"
        " included in the request is expired",
        "have expired",
    ),
    # docker login
    (
        LOGIN,
        f'{STORE} exec: "docker-credential-desktop": executable file not found in $PATH, out: ``',
        "credential helper is missing",
    ),
    (
        LOGIN,
        f"{STORE} docker-credential-desktop resolves to executable in current directory (./docker-credential-desktop),"
        " out: ``",
        "credential helper is missing",
    ),
    (LOGIN, f"{STORE} exit status 1, out: `User interaction is not allowed.`", "Unlock it"),
    (
        LOGIN,
        f'{STORE} exit status 1, out: `pass not initialized: exit status 1: Error: password store is empty. Try "pass'
        ' init".`',
        "Unlock it",
    ),
    (LOGIN, f"{STORE} exit status 1, out: `not implemented`", "SKIP_ECR_AUTH=1"),
    (LOGIN, "Error saving credentials: mkdir /.docker: permission denied", ""),
    (
        LOGIN,
        f"Error response from daemon: login attempt to https://{ECR}/v2/ failed with status: 400 Bad Request",
        "this machine's clock",
    ),
    (
        LOGIN,
        f'Error response from daemon: Get "https://{ECR}/v2/": x509: certificate signed by unknown authority',
        "/etc/docker/certs.d/",
    ),
    # docker build
    (
        BUILD,
        "ERROR: failed to build: failed to solve: r.io/base:1: failed to resolve source metadata for r.io/base:1:"
        " pull access denied, repository does not exist or may require authorization",
        "To pull a base image",
    ),
    (
        BUILD,
        "pull access denied for base, repository does not exist or may require 'docker login': denied: requested"
        " access to the resource is denied",
        "To pull a base image",
    ),
    (
        BUILD,
        f"Head https://{ECR}/v2/base/manifests/1: no basic auth credentials",
        "To pull a base image",
    ),
    (
        BUILD,
        'Get "https://r.io/v2/": x509: certificate signed by unknown authority',
        "/etc/docker/certs.d/",
    ),
    (BUILD, "write /var/lib/docker/tmp/x: no space left on device", ""),
    # docker push
    (
        PUSH,
        "denied: Adding tag '5.1.0-alpha.26169636251' to an image in the repository with name 'shop' in registry with id"
        " '123456789012' exceeds the maximum allowed number of tags per image which is '1000'",
        "Delete old images or tags",
    ),
    (
        PUSH,
        "denied: The repository with name 'shop' in registry with id '123456789012' already has the maximum allowed"
        " number of images which is '100000'",
        "lifecycle policy",
    ),
    (
        PUSH,
        "denied: Your authorization token has expired. Reauthenticate and try again.",
        "docker logout https://",
    ),
    (
        PUSH,
        "denied: Your Authorization Token has expired. Please run 'aws ecr get-login' to fetch a new one.",
        "docker logout https://",
    ),
    (
        PUSH,
        'error getting credentials - err: exec: "docker-credential-desktop.exe": executable file not found in $PATH,'
        " out: ``",
        "credential helper is missing",
    ),
    (
        PUSH,
        f'failed to do request: Head "https://{ECR}/v2/shop/blobs/sha256:1": tls: failed to verify certificate: x509:'
        " certificate signed by unknown authority",
        "/etc/docker/certs.d/",
    ),
    (
        PUSH,
        "failed to authorize: failed to fetch oauth token: unexpected status from GET request to"
        " https://auth.docker.io/token?scope=repository%3Ashop: 401 Unauthorized",
        "docker is not logged in",
    ),
    (
        PUSH,
        'error parsing HTTP 403 response body: unexpected end of JSON input: ""',
        "You are not allowed to push",
    ),
    # convox build
    (
        RELEASE,
        f"denied: User: {DENIED} ecr:BatchGetImage on resource: arn:aws:ecr:us-west-2:1:repository/x\n"
        "ERROR: build error: exit status 1\nERROR: app build failed",
        "ecr_full_access=true",
    ),
    (
        RELEASE,
        "ERROR: an image in this build is not published for the requested build architectures (amd64,arm64): set the"
        " BuildArch app parameter to an architecture the image supports (convox apps params set BuildArch=amd64 -a"
        " my-app) or use multi-arch images",
        "-- --platform linux/amd64,linux/arm64",
    ),
    (
        RELEASE,
        "ERROR: this build will drop env var(s) that are set in your running release RABC123: SECRET_KEY\n\nA newer"
        " release does not have them.",
        "convox env set",
    ),
    (RELEASE, "Starting build... ERROR: required env: SECRET_KEY", "convox env set"),
    (RELEASE, "pull access denied for shop\nERROR: app build failed", "convox registries add"),
    (RELEASE, "Starting build... ERROR: operation not permitted for deploy keys", "use a login"),
    (RELEASE, "Starting build... ERROR: you are unauthorized to access this", "read-only"),
    # convox releases promote
    (PROMOTE, "ERROR: required env: SECRET_KEY, API_KEY", "convox env set"),
    (
        PROMOTE,
        "Promoting RNEWRELEASE... ERROR: can not promote an older release, try rollback",
        "Someone else's newer release is running. Deploy again.",
    ),
    (
        PROMOTE,
        "Promoting RNEWRELEASE... ERROR: app is currently updating",
        "Another update is in progress. Try again after it.",
    ),
    (
        PROMOTE,
        "ERROR: budget cap exceeded for app shop: spent $120.00 of $100.00 cap this month; recovery options:"
        " (1) raise the cap (2) wait",
        "Raise the cap, or wait for the next month.",
    ),
    (
        PROMOTE,
        "Promoting RNEWRELEASE... ERROR: you are unauthorized to access this",
        "This login is read-only.",
    ),
    (
        PROMOTE,
        "system/k8s/web-56f5d77d7-6gx8z Readiness probe failed: HTTP probe failed with statuscode: 404\n"
        "ERROR: rollback",
        "",
    ),
    (
        PROMOTE,
        "app/web/1 exec /bin/web: exec format error\nERROR: rollback",
        "-- --platform linux/amd64",
    ),
    # convox api get
    (ASK, "ERROR: app not found: shop", "APP_NAME"),
    (ASK, "ERROR: invalid authentication", "Check CONVOX_HOST and CONVOX_PASSWORD (in CI,"),
    (
        ASK,
        "ERROR: invalid authentication: no password",
        "Check CONVOX_HOST and CONVOX_PASSWORD (in CI,",
    ),
    (ASK, "ERROR: no racks found, try `convox login`", "Run `convox switch <rack>`"),
    (
        ASK,
        "ERROR: no current rack, use `convox racks` to list and `convox switch <name>` to select",
        "Run `convox switch <rack>`",
    ),
    (ASK, "ERROR: could not find rack: org/prod", "`convox racks` lists them."),
    (ASK, "ERROR: operation not permitted for deploy keys", "the roles Rack Read and App Write"),
    (ASK, "ERROR: forbidden", "Rack Read"),
    (
        ASK,
        'ERROR: Get "https://rack.example.com/apps/shop": dial tcp: lookup rack.example.com: no such host',
        "Check CONVOX_HOST",
    ),
    (ASK, "ERROR: unexpected EOF", "Check CONVOX_HOST"),
]


def error_of(world: World, command: str, text: str, *args: str) -> str:
    """Let a command fail with the text, and return what a deploy says about it."""
    world.constants = {"PUSH_PAUSE": 0, "POLL_SECONDS": 0.01, "PATIENCE_SECONDS": 0}
    (world.home / "repositories").write_text("123456789012/shop\n")
    world.rules = {CREATE: EXISTS, command: {"status": 1, "err": f"{text}\n"}}
    ran = world.deploy("--result", "result.json", *args)
    assert f"`{command.partition(' --')[0]}" in ran.err and "Traceback" not in ran.text
    if "Its output is above." in ran.err:  # the end does not quote it, the result does
        above = [f"  > {line}" for line in text.splitlines()[-20:]]
        recorded = json.loads((world.app / "result.json").read_text())["error"]
        assert "\n".join(above) in recorded and ran.text.count(f"{text}\n") == 1
    return ran.err


def advice_of(err: str, text: str) -> str:
    """Return what an error says after the text of the command, and before the state of the app."""
    shown = "".join(f"  {line}\n" for line in text.rstrip().splitlines())
    _, _, advice = err.partition(f" exited with code 1.\n{shown}")
    advice = advice or err.partition(" exited with code 1. Its output is above.\n")[2]
    return re.split(r"(?m)^(?:shop is|Nothing) ", advice)[0].strip()


def said_of(command: str, text: str) -> str:
    """Return what a failed command's error says after the command's text."""
    name = f"`{command.partition(' --')[0]}`"
    error = str(CommandFailed(text.strip(), name, 1))
    assert error.startswith(f"{name} exited with code 1.")
    return advice_of(f"{error}\n", text)


@pytest.mark.parametrize(("command", "text", "advice"), REPORTS)
def test_a_reported_error_gets_the_advice_that_fits(command: str, text: str, advice: str) -> None:
    said = said_of(command, text)
    assert advice in said and bool(advice) == bool(said)


# What an app or its build prints, and the CLI's own error at the end: none of it is about logins or registries.
DECOYS = [
    (PROMOTE, "app/web/1 EACCES: permission denied, open '/data'\nERROR: timeout"),
    (PROMOTE, "app/web/1 403 Forbidden\nERROR: timeout"),
    (PROMOTE, "ERROR: forbidden: you are not allowed"),
    (RELEASE, "ERROR: response status: 403"),
    (PROMOTE, "no such app: x\nERROR: timeout"),
    (PROMOTE, "app/web/1 ERROR: app not found: x\nERROR: timeout"),
    (PROMOTE, "app/web/1 ERROR: invalid authentication\nERROR: rollback"),
    (PROMOTE, "app/web/1 ERROR: unauthorized to access the cache\nERROR: rollback"),
    (PROMOTE, "app/web/1 cloned with the deploy key\nERROR: something new"),
    (PROMOTE, 'FATAL:  password authentication failed for user "shop"\nERROR: timeout'),
    (PROMOTE, "app/web/1 GET /api 401\nERROR: timeout"),
    (PROMOTE, "app/web/1 ERROR: forbidden\nERROR: timeout"),
    (PROMOTE, "app/web/1 dial tcp: connection refused\nERROR: timeout"),
    (PROMOTE, "app/web/1 Error response from daemon: x\nERROR: rollback"),
    (PROMOTE, "assets build failed\nERROR: rollback"),
    (PROMOTE, "assets build failed\nERROR: something new"),
    (RELEASE, "app not found\nx509: unknown\nERROR: exit status 1"),
    (RELEASE, "cloning with the deploy key\nERROR: exit status 1"),
    (ASK, "ERROR: timeout"),
    (BUILD, "npm ERR! 403 Forbidden - GET https://registry.npmjs.org/left-pad"),
    (BUILD, "mkdir: cannot create directory '/data': Permission denied"),
    (BUILD, "fatal: Authentication failed: unauthorized"),
    (BUILD, 'go: Get "https://proxy.golang.org/x": x509: certificate signed by unknown authority'),
    (BUILD, "npm ERR! Your token has expired"),
    (BUILD, "error: not implemented"),
    (BUILD, "lib client version 3\nthe library is too old"),
    (VERSION, "The command 'docker' could not be found in this WSL 2 distro."),
    (LOGIN, "Error saving credentials: open /home/ci/.docker/config.json18: permission denied"),
]


@pytest.mark.parametrize(("command", "text"), DECOYS)
def test_an_apps_own_output_gets_no_advice_for_the_tool(command: str, text: str) -> None:
    assert said_of(command, text) == ""


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (PROMOTE, "app/web/1 403 Forbidden\nERROR: unexpected EOF"),
        (ASK, "ERROR: unexpected EOF"),
        (ASK, 'ERROR: Get "https://rack.example.com/apps/shop": dial tcp: no such host'),
    ],
)
def test_a_rack_that_cannot_be_reached_is_no_wrong_login(
    world: World, command: str, text: str
) -> None:
    advice = advice_of(error_of(world, command, text), text)
    assert advice == "Check CONVOX_HOST, and that this machine can reach the rack."


def test_the_name_of_a_repository_does_not_make_an_error_permanent(world: World) -> None:
    name = "x509-api/denied-party/unauthorized-app/forbidden/immutable-shop"
    world.constants = {"PUSH_PAUSE": 0}
    world.write("docker-compose.yml", COMPOSE.replace("/shop:", f"/{name}:"))
    (world.home / "repositories").write_text(f"123456789012/{name}\n")
    error = f'Head "https://{ECR}/v2/{name}/blobs/sha256:1": net/http: TLS handshake timeout\n'
    world.rules[PUSH] = {"number": 1, "status": 1, "err": error}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert "Trying once more in 0 s." in ran.out


@pytest.mark.parametrize("text", ["unexpected EOF", "Post https://rack: dial tcp: i/o timeout"])
def test_a_release_that_may_exist_is_not_denied(world: World, text: str) -> None:
    err = error_of(world, RELEASE, f"Starting build... ERROR: {text}")
    assert "Nothing was released" not in err
    assert "\nNothing was promoted. shop was last seen running ROLDRELEASE." in err
    assert " A release may have been built.\nTo look: `convox releases --app shop`.\n" in err


def test_of_a_long_error_the_last_lines_are_recorded(world: World) -> None:
    lines = [f"line {number}" for number in range(30)]
    shown = "".join(f"  > {line}\n" for line in [*lines[-19:], "ERROR: rollback"])
    err = error_of(world, PROMOTE, "\n".join([*lines, "ERROR: rollback"]))
    assert "`convox releases promote` exited with code 1. Its output is above.\n" in err
    recorded = json.loads((world.app / "result.json").read_text())["error"]
    assert f"`convox releases promote` exited with code 1.\n{shown.rstrip()}" in recorded


def test_what_a_silent_command_prints_to_stdout_is_shown_if_it_fails(world: World) -> None:
    text = "The command 'docker' could not be found in this WSL 2 distro.\n"
    world.rules = {VERSION: {"status": 1, "out": text}}
    assert text in world.deploy().err


def test_a_release_that_lacks_variables_is_not_still_being_built(world: World) -> None:
    err = error_of(world, RELEASE, "ERROR: required env: SECRET_KEY")
    assert "Nothing was released or promoted." in err


@pytest.mark.parametrize(
    ("command", "args"),
    [(RELEASE, []), ("convox releases rollback --app", ["--rollback", "ROLDERRELEA"])],
)
def test_a_cause_on_stdout_where_only_an_id_is_expected_is_shown(
    world: World, command: str, args: list[str]
) -> None:
    """A wrapper of the CLI, or docker's stub in WSL, prints there. Only stderr is printed as it comes."""
    world.constants = {"POLL_SECONDS": 0.01}
    world.rules = {command: {"status": 1, "out": "cannot start convox\n"}}
    ran = world.deploy("--result", "result.json", *args)
    assert ran.status == 1 and ran.text.count("cannot start convox\n") == 1
    assert "cannot start convox" in (world.app / "result.json").read_text()
