"""Pushing: creating a missing repository, one repetition, digests and parallel pushes."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import COMPOSE, DIGEST, ECR, World, ended, is_alive
from standin import Rule

TWO_SERVICES = COMPOSE + f"  worker:\n    image: {ECR}/worker:TAG\n    build: worker\n"
CREATE = "aws ecr create-repository"
EXISTS: Rule = {
    "status": 254,
    "err": "An error occurred (RepositoryAlreadyExistsException) when calling ...\n",
}
DENIED: Rule = {
    "status": 254,
    "err": "An error occurred (AccessDeniedException) when calling CreateRepository: no\n",
}


@pytest.fixture
def two_services(world: World) -> World:
    world.write("docker-compose.yml", TWO_SERVICES)
    world.write("worker/Dockerfile", "FROM scratch\n")
    return world


def recorded_error(world: World) -> str:
    return str(json.loads((world.app / "result.json").read_text())["error"])


@pytest.fixture(autouse=True)
def impatient(world: World) -> None:
    world.constants = {"PUSH_PAUSE": 0}


# --- the repository -------------------------------------------------------------------

MISSING = [  # docker's errors for a missing repository: 20.10 and classic 29, containerd, and both after an EOF
    "name unknown: The repository with name 'shop' does not exist in the registry with id '123456789012'",
    "error from registry: The repository with name 'shop' does not exist in the registry with id '123456789012'",
    "EOF",
    'failed to do request: Post "https://123456789012.dkr.ecr.us-east-1.amazonaws.com/v2/shop/blobs/uploads/": EOF',
    "an error that no version of docker prints so far",
]


@pytest.mark.parametrize("reason", MISSING)
def test_a_missing_repository_is_created_and_the_push_is_repeated_immediately(
    world: World, reason: str
) -> None:
    world.constants = {"PUSH_PAUSE": 600}
    world.rules["docker push"] = {"number": 1, "status": 1, "err": reason}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands("docker push")) == 2 and len(world.commands(CREATE)) == 1
    assert "Trying once more" not in ran.text


def test_an_existing_repository_is_neither_looked_up_nor_created(world: World) -> None:
    (world.home / "repositories").write_text("123456789012/shop\n")
    assert world.deploy().status == 0
    assert world.commands("aws") == ["aws ecr get-login-password --region us-east-1"]


def test_the_push_after_creating_a_repository_does_not_count_as_the_repetition(
    world: World,
) -> None:
    """ECR may need a moment to know a new repository."""
    missing: Rule = {"status": 1, "err": MISSING[0]}
    world.rules["docker push"] = {"sequence": [missing] * 2 + [{"usual": True}]}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands("docker push")) == 3
    assert ran.out.count("Trying once more in 0 s.") == 1


def test_a_push_that_still_fails_after_a_repository_was_created_is_repeated_once(
    world: World,
) -> None:
    world.rules["docker push"] = {"status": 1, "err": MISSING[0]}
    ran = world.deploy()
    assert ran.status == 1 and ran.text.count(MISSING[0]) == 3  # once for each push
    assert len(world.commands("docker push")) == 3
    assert ran.out.count("Trying once more in 0 s.") == 1


def test_a_push_after_an_eof_is_repeated_if_someone_else_created_the_repository(
    world: World,
) -> None:
    world.rules["docker push"] = {"number": 1, "status": 1, "err": "EOF"}
    world.rules[CREATE] = {"usual": True, **EXISTS}
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_a_push_is_repeated_if_another_deploy_has_just_created_the_repository(
    world: World,
) -> None:
    world.rules["docker push"] = {"number": 1, "status": 1, "err": MISSING[0]}
    world.rules[CREATE] = {"usual": True, **EXISTS}
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_a_repository_that_exists_does_not_change_the_error_of_the_push(world: World) -> None:
    world.rules = {"docker push": {"status": 1, "err": "unexpected EOF"}, CREATE: EXISTS}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1 and ran.out.count("\nunexpected EOF\n") == 2  # once for each push
    assert recorded_error(world).endswith(" exited with code 1.\n  > unexpected EOF")
    assert len(world.commands("docker push")) == 2 == len(world.commands(CREATE))
    assert "exited with code 1. Its output is above.\nNothing was" in ran.err


@pytest.mark.parametrize("reason", MISSING[:4])
def test_a_user_who_cannot_create_repositories_gets_an_error_without_a_repetition(
    world: World, reason: str
) -> None:
    world.rules = {"docker push": {"status": 1, "err": reason}, CREATE: DENIED}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1 and f"\n  > {reason}\n" in recorded_error(world)
    assert len(world.commands("docker push")) == 1
    assert "The repository may not exist, and was not created." in ran.err
    assert "AccessDeniedException" in ran.err and ran.text.count(reason) == 1


def test_other_failures_are_repeated_for_a_user_who_cannot_create_repositories(
    world: World,
) -> None:
    world.rules = {"docker push": {"number": 1, "status": 1, "err": "broken pipe"}, CREATE: DENIED}
    (world.home / "repositories").write_text("123456789012/shop\n")
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_the_push_error_mentions_that_aws_is_missing(world: World) -> None:
    (world.bin / "aws").unlink()
    world.rules["docker push"] = {"status": 1, "err": MISSING[0]}
    ran = world.deploy("--result", "result.json", env={"SKIP_ECR_AUTH": "1"})
    assert ran.status == 1
    assert ran.text.count("name unknown") == 1 and "\n  > name unknown" in recorded_error(world)
    assert "The repository may not exist, and was not created. " in ran.err


def test_nothing_is_created_after_a_signal(world: World) -> None:
    world.rules["docker push"] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGINT)
    assert ran.status == 128 + signal.SIGINT
    assert world.commands(CREATE) == [] and len(world.commands("docker push")) == 1


def test_repositories_are_never_created_outside_ecr(world: World) -> None:
    world.write("docker-compose.yml", "web:\n  image: ghcr.io/me/shop:TAG\n")
    world.rules["docker push"] = {"status": 1, "err": MISSING[0]}
    ran = world.deploy()
    assert ran.status == 1
    assert world.commands("aws") == [] and len(world.commands("docker push")) == 2


def test_two_images_in_one_repository_create_it_once(two_services: World) -> None:
    two_services.write("docker-compose.yml", TWO_SERVICES.replace("/worker:TAG", "/shop:TAG"))
    ran = two_services.deploy()
    assert ran.status == 0, ran.text
    assert len(two_services.commands(CREATE)) == 1


# --- the repetition -------------------------------------------------------------------


PERMANENT = [
    "denied: requested access to the resource is denied",
    "no basic auth credentials",
    "unknown: unexpected status from HEAD request to https://r.io/v2/shop/manifests/x: 403 Forbidden",
    "unauthorized: authentication required",
    "denied: Your authorization token has expired. Reauthenticate and try again.",
    "tag invalid: The image tag 'x' cannot be overwritten because the tag is immutable.",
    'failed to do request: Head "https://r.io/v2/": x509: certificate signed by unknown authority',
]


@pytest.mark.parametrize(
    "reason",
    [
        "received unexpected HTTP status: 503",
        "unexpected EOF",
        "write /var/lib/docker/tmp: no space left on device",
        "an error that nobody has seen yet",
    ],
)
def test_a_failure_without_a_known_permanent_cause_is_repeated(world: World, reason: str) -> None:
    (world.home / "repositories").write_text("123456789012/shop\n")
    world.rules["docker push"] = {"number": 1, "status": 1, "err": reason}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands("docker push")) == 2
    why = "`docker push` for web exited with code 1."
    assert f"{reason}\n" in ran.out and f"warning: {why} Trying once more in 0 s.\n" in ran.out


def test_a_failed_push_is_repeated_exactly_once(world: World) -> None:
    (world.home / "repositories").write_text("123456789012/shop\n")
    world.rules["docker push"] = {"status": 1, "err": "unexpected EOF"}
    ran = world.deploy()
    assert ran.status == 1
    assert len(world.commands("docker push")) == 2
    assert ran.out.count("Trying once more") == 1


def test_a_push_is_repeated_after_a_pause(world: World) -> None:
    world.constants = {"PUSH_PAUSE": 0.5}
    (world.home / "repositories").write_text("123456789012/shop\n")
    world.rules["docker push"] = {"number": 1, "status": 1, "err": "unexpected EOF"}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0 and "Trying once more in 0.5 s.\n" in ran.out
    assert json.loads((world.app / "result.json").read_text())["seconds"]["push"] >= 0.5


@pytest.mark.parametrize("reason", PERMANENT)
def test_a_failure_with_a_known_permanent_cause_is_not_repeated(world: World, reason: str) -> None:
    world.rules = {"docker push": {"status": 1, "err": reason}, CREATE: EXISTS}
    options = ["--tag", "v1", "--result", "result.json"]  # a tag that does not name the content
    ran = world.deploy(*options)
    assert ran.status == 1 and ran.text.count(reason) == 1
    assert f"\n  > {reason}" in recorded_error(world)
    assert len(world.commands("docker push")) == 1 and "Trying once more" not in ran.out


def test_a_failed_push_to_a_repository_named_immutable_fails(world: World) -> None:
    world.write("docker-compose.yml", f"web:\n  image: {ECR}/immutable-shop:TAG\n")
    world.rules = {"docker push": {"status": 1, "err": "denied: immutable-shop"}, CREATE: EXISTS}
    ran = world.deploy()
    assert ran.status == 1 and "push failed:" in ran.err
    assert world.commands("convox build --app") == []


def test_a_signal_interrupts_the_pause_before_the_repetition(world: World) -> None:
    world.constants = {"PUSH_PAUSE": 600}
    world.rules = {"docker push": {"status": 1, "err": "unexpected EOF"}, CREATE: EXISTS}
    process = world.start()
    assert process.stdout and any("Trying once more in 600 s." in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.status == 143
    assert len(world.commands("docker push")) == 1


@pytest.mark.parametrize(("tag", "status"), [(None, 0), ("v1", 1)])
def test_unchanged_content_is_deployed_again_if_the_tags_are_immutable(
    world: World, tag: str | None, status: int
) -> None:
    """The default tag names the content. ECR refuses the same content, too."""
    refusal = "tag invalid: The image tag 'x' cannot be overwritten because the tag is immutable."
    world.rules["docker push"] = {"status": 1, "err": refusal}
    world.rules[CREATE] = EXISTS
    ran = world.deploy("--result", "result.json", env={"IMAGE_TAG": tag})
    assert ran.status == status, ran.text
    assert ("is already in the registry." in ran.out) == (tag is None)
    images = json.loads((world.app / "result.json").read_text())["images"]
    assert [image["digest"] for image in images] == ([None] if tag is None else [])
    assert len(world.commands("docker push")) == 1


@pytest.mark.parametrize(
    "command", ["docker build", "convox build --app", "convox releases promote --app", "before"]
)
def test_no_other_command_that_changes_something_is_repeated(world: World, command: str) -> None:
    world.add_hooks()
    world.rules[command] = {"status": 1, "err": "connection reset by peer"}
    assert world.deploy().status == 1
    assert len(world.commands(command)) == 1


# --- docker's options and output ------------------------------------------------------


def digests(world: World) -> list[str | None]:
    """Deploy, and return the digests in the result."""
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    images = json.loads((world.app / "result.json").read_text())["images"]
    return [image["digest"] for image in images]


def test_a_push_that_succeeds_without_a_digest_is_a_push(world: World) -> None:
    world.rules["docker push"] = {"out": "Pushed, in the words of another docker\n"}
    assert digests(world) == [None]
    assert world.commands(CREATE) == []


def test_the_digest_is_read_from_the_last_line_of_the_push(world: World) -> None:
    world.rules["docker push"] = {
        "usual": True,
        "out": "digest: sha256:" + "0" * 64 + "\nThe push refers to repository [r.io/digest]\n",
    }
    assert digests(world) == [DIGEST]


@pytest.mark.parametrize("value", [None, "1", "0"])
def test_default_attestations_are_off_so_that_unchanged_content_keeps_its_image_id(
    world: World, value: str | None
) -> None:
    """With buildx and the containerd image store, they would make every image unique."""
    assert world.deploy(env={"BUILDX_NO_DEFAULT_ATTESTATIONS": value}).status == 0
    assert world.call("docker build --tag").env["BUILDX_NO_DEFAULT_ATTESTATIONS"] == (value or "1")
    for other in (
        "docker tag",
        "docker image inspect",
        "docker image rm",
        "convox releases promote --app",
    ):
        assert world.call(other).env.get("BUILDX_NO_DEFAULT_ATTESTATIONS") == value


# --- in parallel ----------------------------------------------------------------------


def test_pushes_run_in_parallel_and_each_line_names_its_service(two_services: World) -> None:
    for name, other in (("shop", "worker"), ("worker", "shop")):
        two_services.rules[f"docker push {ECR}/{name}"] = {
            "usual": True,
            "once": f"docker push {ECR}/{other}",
            "out": f"a layer of {name}: Pushed\n",
            "err": f"a warning about {name}\n",
        }
    ran = two_services.deploy()
    assert ran.status == 0, ran.text
    lines = ran.out.splitlines()
    for service, name in (("web", "shop"), ("worker", "worker")):
        assert f"{service} | a layer of {name}: Pushed" in lines
        assert f"{service} | a warning about {name}" in lines


def test_the_output_of_a_single_push_has_no_prefix(world: World) -> None:
    world.rules["docker push"] = {"usual": True, "out": "as docker wrote it\n"}
    assert "\nas docker wrote it\n" in world.deploy().out


def test_a_failed_push_ends_the_others_and_is_the_one_reported(two_services: World) -> None:
    two_services.rules = {
        f"docker push {ECR}/worker": {"hang": True, "child": True},
        f"docker push {ECR}/shop": {"once_one_hangs": True, "status": 1, "err": "denied: no"},
        CREATE: EXISTS,
    }
    ran = two_services.deploy("--result", "result.json")
    assert ran.status == 1 and "\n  > denied: no" in recorded_error(two_services)
    assert "`docker push` for web exited with code 1. Its output is above.\n" in ran.err
    assert ran.text.count("denied: no") == 1
    assert not is_alive(two_services.await_hanging())
    assert two_services.commands("convox build --app", "convox releases promote --app") == []
    assert two_services.nothing_is_left()


def test_preflight_checks_run_in_parallel(world: World) -> None:
    world.rules = {
        "docker version": {"usual": True, "once": "aws ecr get-login-password"},
        "aws ecr get-login-password": {"usual": True, "once": "convox build --help"},
        "convox build --help": {"usual": True, "once": "docker version"},
    }
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_docker_logs_in_to_one_registry_at_a_time(world: World) -> None:
    """docker rewrites its config.json without locking."""
    other = ECR.replace("us-east-1", "eu-west-1")
    world.write("docker-compose.yml", COMPOSE + f"  worker:\n    image: {other}/worker:TAG\n")
    world.rules["docker login"] = {"usual": True, "lock": "logging-in"}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands("docker login")) == 2


# --- what is left behind --------------------------------------------------------------


def names_removed(world: World) -> set[str]:
    return {name for line in world.commands("docker image rm") for name in line.split()[4:]}


def test_a_successful_push_removes_only_the_temporary_tag(world: World) -> None:
    assert world.deploy().status == 0
    assert names_removed(world) == {world.call("docker tag").argv[2]}


@pytest.mark.parametrize("how", ["fails", "is stopped"])
def test_a_failed_push_leaves_no_tag_in_docker(two_services: World, how: str) -> None:
    world, push = two_services, f"docker push {ECR}/worker"
    world.rules[CREATE] = EXISTS
    (world.home / "repositories").write_text("123456789012/shop\n123456789012/worker\n")
    if how == "fails":
        world.rules[push] = {"status": 1, "err": "denied"}
        ran = world.deploy()
    else:
        world.rules[push] = {"hang": True}
        ran = world.deploy_and_signal(signal.SIGTERM)
    assert ran.status in (1, 143)
    tags = {
        call.argv[3]
        for call in world.calls
        if call.line.startswith("docker tag") and "/worker:" in call.argv[3]
    }
    locals_ = {call.argv[3] for call in world.calls if call.line.startswith("docker build --tag")}
    assert tags | locals_ <= names_removed(world)


def test_a_failed_build_leaves_no_tag_in_docker(world: World) -> None:
    world.rules["docker build"] = {"status": 1}
    assert world.deploy().status == 1
    assert world.call("docker build --tag").argv[3] in names_removed(world)


def test_a_hanging_cleanup_is_abandoned(world: World) -> None:
    world.constants = {"GRACE_SECONDS": 0.2}
    world.rules["docker image rm"] = {"hang": True}
    ran: Any = ended(world.start())
    assert ran.status == 0, ran.text
    assert "shop is now running RNEWRELEASE." in ran.out


def test_a_user_who_cannot_create_repositories_still_gets_the_advice_on_the_push(
    world: World,
) -> None:
    world.rules["docker push"] = {
        "status": 1,
        "err": "tag invalid: The image tag 'v1' cannot be overwritten because the tag is immutable.",
    }
    world.rules[CREATE] = DENIED
    ran = world.deploy("--tag", "v1")
    assert ran.status == 1 and "Unset IMAGE_TAG or choose a new tag." in ran.err
    assert "may not exist" not in ran.err
