"""Errors that users have reported in public: the advice that fits, and texts that must not get it."""

from __future__ import annotations

import json

import pytest
from conftest import COMPOSE, ECR, World
from standin import Rule

VERSION, PASSWORD, LOGIN = "docker version", "aws ecr get-login-password", "docker login"
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
        "DOCKER_CONTEXT",
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
    (PASSWORD, "'f84d75ff2dd3e8682912dae5e7be77540d9d68d0'", "rm -r ~/.aws/cli/cache"),
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
    (PASSWORD, "The config profile (nope) could not be found", "AWS_PROFILE names a profile"),
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
    (LOGIN, "Error saving credentials: mkdir /.docker: permission denied", "DOCKER_CONFIG"),
    (
        LOGIN,
        "Error saving credentials: open /home/ci/.docker/config.json1835442493: permission denied",
        "DOCKER_CONFIG",
    ),
    (
        LOGIN,
        f"Error response from daemon: login attempt to https://{ECR}/v2/ failed with status: 400 Bad Request",
        "ECR does not accept the password",
    ),
    # docker push
    (
        PUSH,
        "denied: Adding tag '5.1.0-alpha.26169636251' to an image in the repository with name 'shop' in registry with id"
        " '123456789012' exceeds the maximum allowed number of tags per image which is '1000'",
        "batch-delete-image",
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
        "two architectures",
    ),
    (
        RELEASE,
        "ERROR: this build will drop env var(s) that are set in your running release RABC123: SECRET_KEY\n\nA newer"
        " release does not have them.",
        "convox env set",
    ),
    (RELEASE, "ERROR: no such build: BABCDEFGHIJ", "convox builds --app shop"),
    (RELEASE, "ERROR: required env: SECRET_KEY", "convox env set"),
    # convox releases promote
    (PROMOTE, "ERROR: required env: SECRET_KEY, API_KEY", "convox env set"),
    (
        PROMOTE,
        "system/k8s/web-56f5d77d7-6gx8z Readiness probe failed: HTTP probe failed with statuscode: 404\n"
        "ERROR: rollback",
        "convox deploy-debug",
    ),
    # convox api get
    (ASK, "ERROR: app not found", "APP_NAME"),
    (ASK, "ERROR: no such app: shop", "APP_NAME"),
    (ASK, "ERROR: Command not supported for deploy key", "--no-verify"),
    (ASK, "ERROR: response status: 401", "CONVOX_PASSWORD"),
    (
        ASK,
        'ERROR: Get "https://rack.example.com/apps/shop": dial tcp: lookup rack.example.com: no such host',
        "Check CONVOX_HOST",
    ),
    (ASK, "ERROR: unexpected EOF", "Check CONVOX_HOST"),
]


def error_of(world: World, command: str, text: str, *args: str) -> str:
    """Let a command fail with the text, and return what a deploy says about it."""
    world.constants = {"PUSH_PAUSES": []}
    (world.home / "repositories").write_text("123456789012/shop\n")
    world.rules = {command: {"status": 1, "err": f"{text}\n"}, CREATE: EXISTS}
    ran = world.deploy("--result", "result.json", *args)
    assert f"`{command.partition(' --')[0]}" in ran.err and "Traceback" not in ran.text
    return ran.err


@pytest.mark.parametrize(("command", "text", "advice"), REPORTS)
def test_a_reported_error_gets_the_advice_that_fits(
    world: World, command: str, text: str, advice: str
) -> None:
    err = error_of(world, command, text)
    assert advice in err.replace(text, "")
    assert advice == "--no-verify" or "--no-verify" not in err


# What an app prints during a release, and the CLI's own error at the end: what must not be advised.
DECOYS = [
    (PROMOTE, "app/web/1 EACCES: permission denied, open '/data'\nERROR: timeout"),
    (PROMOTE, "app/web/1 403 Forbidden\nERROR: timeout"),
    (PROMOTE, "ERROR: forbidden: you are not allowed"),
    (RELEASE, "ERROR: response status: 403"),
    (PROMOTE, "app/web/1 403 Forbidden\nERROR: unexpected EOF"),
    (PROMOTE, "no such app: x\nERROR: timeout"),
    (PROMOTE, 'FATAL:  password authentication failed for user "shop"\nERROR: timeout'),
    (PROMOTE, "app/web/1 GET /api 401\nERROR: timeout"),
    (PROMOTE, "app/web/1 ERROR: forbidden\nERROR: timeout"),
    (PROMOTE, "app/web/1 dial tcp: connection refused\nERROR: timeout"),
    (PROMOTE, "assets build failed\nERROR: rollback"),
    (RELEASE, "app not found\nx509: unknown\nERROR: exit status 1"),
    (ASK, "ERROR: timeout"),
    (ASK, "ERROR: unexpected EOF"),
    (ASK, "ERROR: app not found"),
]


@pytest.mark.parametrize(("command", "text"), DECOYS)
def test_an_apps_own_output_gets_no_advice_for_the_tool(
    world: World, command: str, text: str
) -> None:
    err = error_of(world, command, text)
    assert "--no-verify" not in err
    if command != ASK:
        assert "CONVOX_HOST and CONVOX_PASSWORD" not in err
        assert "APP_NAME" not in err and "registries add" not in err
    if "EOF" not in text:
        assert "Check CONVOX_HOST" not in err


def test_the_name_of_a_repository_does_not_make_an_error_permanent(world: World) -> None:
    name = "x509-api/denied-party/unauthorized-app/forbidden/immutable-shop"
    world.constants = {"PUSH_PAUSES": [0]}
    world.write("docker-compose.yml", COMPOSE.replace("/shop:", f"/{name}:"))
    (world.home / "repositories").write_text(f"123456789012/{name}\n")
    error = f'Head "https://{ECR}/v2/{name}/blobs/sha256:1": net/http: TLS handshake timeout\n'
    world.rules[PUSH] = {"number": 1, "status": 1, "err": error}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert "Retrying in 0 s." in ran.out


def test_a_release_that_may_exist_is_not_denied(world: World) -> None:
    for text in ("ERROR: no such build: BABCDEFGHIJ", "ERROR: timeout waiting for container"):
        assert "Nothing was released" not in error_of(world, RELEASE, text)


@pytest.mark.parametrize(
    "text",
    [
        "log\nERROR: this build will drop env var(s): A\n" + "more\n" * 30,
        "ERROR: first\nERROR: second\n" + "x\n" * 20,
    ],
)
def test_a_long_error_is_shown_from_its_first_line(world: World, text: str) -> None:
    lines = text.partition("log\n")[2] or text
    shown = "".join(f"  {line}\n" for line in lines.splitlines()[:21])
    err = error_of(world, PROMOTE, text)
    assert f"exited with code 1.\n{shown}" in err and f"{shown}  " not in err
    recorded = json.loads((world.app / "result.json").read_text())["error"]
    assert recorded.startswith(f"`convox releases promote` exited with code 1.\n{shown.rstrip()}")


def test_what_a_silent_command_prints_to_stdout_is_shown_if_it_fails(world: World) -> None:
    text = "The command 'docker' could not be found in this WSL 2 distro.\n"
    world.rules = {VERSION: {"status": 1, "out": text}}
    assert text in world.deploy().err


def test_a_release_that_lacks_variables_is_not_still_being_built(world: World) -> None:
    err = error_of(world, RELEASE, "ERROR: required env: SECRET_KEY")
    assert "Nothing was released or promoted." in err
