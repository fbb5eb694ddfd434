"""What the tool passes to docker, aws, convox, git and the hooks: order, arguments, environment and input."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import COMPOSE, ECR, REAL_GIT, SHORT_ID, World

TOKEN = re.compile("token-of-ecr")

BUILD = ["--app", "shop", "--manifest", "docker-compose.yml", "--description"]
WAIT: dict[str, list[str]] = {"v2": ["--wait"], "v3": []}  # v3 always waits
READ_APP, LIST = ["api", "get", "/apps/shop"], ["api", "get", "/apps/shop/releases"]
OLD = [*LIST[:2], f"{LIST[2]}/ROLDRELEASE"]  # whose description the output shows
HELP = [["build", "--help"], ["releases", "promote", "--help"]]
# A convox.yml whose image convox pushes to the rack's registry, by a CLI of v3.
AS_IT_IS = "services:\n  web:\n    build: .\n"


def convox_calls(world: World) -> list[list[str]]:
    return [call.argv[1:] for call in world.calls if call.argv[0] == "convox"]


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_each_cli_generation_gets_the_options_it_lists(world: World, cli: str) -> None:
    commit = world.add_git()
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    directory = world.call("convox build --app").argv[-1]
    assert convox_calls(world) == [
        *HELP,
        READ_APP,
        OLD,
        ["build", *BUILD, f"{commit} Sell more", "--id", directory],
        READ_APP,
        LIST,
        ["releases", "promote", "--app", "shop", *WAIT[cli], "RNEWRELEASE"],
        READ_APP,
    ]
    assert f"\nshop is now running RNEWRELEASE ({commit} Sell more).\n" in ran.out


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_a_release_that_was_built_before_is_compared_and_promoted(world: World, cli: str) -> None:
    ran = world.deploy("--release", "RNEWRELEASE", env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    assert convox_calls(world) == [
        *HELP,
        READ_APP,
        OLD,
        [*LIST[:2], f"{LIST[2]}/RNEWRELEASE"],
        OLD,
        READ_APP,
        LIST,
        ["releases", "promote", "--app", "shop", *WAIT[cli], "RNEWRELEASE"],
        READ_APP,
    ]
    assert {call.argv[0] for call in world.calls} == {"convox"}


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_a_rollback_asks_for_the_id_of_the_copy(world: World, cli: str) -> None:
    world.add_hooks()
    rack = ["--rack", "staging"]
    ran = world.deploy(*rack, "--rollback", "ROLDERRELEA", env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    read = ["api", "get", *rack]
    assert convox_calls(world) == [
        *HELP,
        [*read, "/apps/shop"],
        [*read, "/apps/shop/releases/ROLDRELEASE"],
        [*read, "/apps/shop/releases/ROLDERRELEA"],
        [*read, "/apps/shop"],
        ["releases", "rollback", "--app", "shop", *rack, *WAIT[cli], "--id", "ROLDERRELEA"],
        [*read, "/apps/shop"],
    ]
    assert {call.argv[0] for call in world.calls} == {"convox"}  # neither hooks nor docker


@pytest.mark.parametrize("rack", [[], ["--rack", "staging"]])
@pytest.mark.parametrize("args", [[], ["--release", "RNEWRELEASE"], ["--rollback", "ROLDERRELEA"]])
def test_the_containers_of_a_promote_are_looked_at_with_a_cli_of_v3(
    world: World, args: list[str], rack: list[str]
) -> None:
    world.constants = {"DEBUG_SECONDS": [0, 60]}
    request = "convox releases " + ("rollback" if "--rollback" in args else "promote")
    world.rules[f"{request} --app"] = {"once": "convox deploy-debug", "usual": True}
    ran = world.deploy(*args, *rack, env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 0, ran.text
    debug = ["--output", "json", *rack, "--lines", "20", "--no-events", "--app", "shop"]
    assert world.call("convox deploy-debug").argv[1:] == ["deploy-debug", *debug]


def test_the_containers_of_a_promote_are_not_looked_at_with_a_cli_of_v2(world: World) -> None:
    world.constants = {"DEBUG_SECONDS": [0, 0]}
    world.rules["convox releases promote --app"] = {"pause": 0.3, "usual": True}
    assert world.deploy().status == 0
    assert world.commands("convox deploy-debug") == []


@pytest.mark.parametrize("arg", ["", "ARG KEY\n"])
def test_an_app_as_it_is_is_pushed_by_convox(world: World, arg: str) -> None:
    world.write("convox.yml", AS_IT_IS)
    world.write("Dockerfile", f"FROM scratch\n{arg}")
    commit = world.add_git()
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v3", "STANDIN_APP_ENV": "KEY=value"})
    assert ran.status == 0, ran.text
    build = world.call("convox build --external")
    about = ["--description", f"{commit} Sell more", "--id"]
    assert build.argv[3:-1] == ["--app", "shop", "--manifest", "convox.yml", *about]
    local = world.call("docker build --tag").argv[3]
    assert build.upload == {"convox.yml": AS_IT_IS, "Dockerfile": f"FROM {local}\n"}
    assert ["env", "--app", "shop"] in convox_calls(world)
    given = ["--build-arg", "KEY"] if arg else []
    assert world.call("docker build --tag").argv[4:] == [*given, "."]
    assert (world.call("docker build --tag").env.get("KEY")) == ("value" if arg else None)


def test_convox_pushes_with_the_builder_of_dockers_current_context(world: World) -> None:
    """An inherited one would not find our image, and attestations would make another one of it."""
    world.write("convox.yml", AS_IT_IS)
    ran = world.deploy(
        env={
            "CONVOX_STANDIN_CLI": "v3",
            "BUILDX_BUILDER": "remote",
            "STANDIN_PLATFORM": "linux/arm64",
        }
    )
    assert ran.status == 0, ran.text
    env = world.call("convox build --external").env
    assert "BUILDX_BUILDER" not in env
    assert env["BUILDX_NO_DEFAULT_ATTESTATIONS"] == "1"
    assert env["DOCKER_DEFAULT_PLATFORM"] == "linux/arm64"
    env = world.call("docker build --tag").env  # ours is the user's choice
    assert (env["BUILDX_BUILDER"], env["BUILDX_NO_DEFAULT_ATTESTATIONS"]) == ("remote", "1")


def test_attestations_that_are_asked_for_stay(world: World) -> None:
    world.write("convox.yml", AS_IT_IS)
    env = {"CONVOX_STANDIN_CLI": "v3", "BUILDX_NO_DEFAULT_ATTESTATIONS": "0"}
    assert world.deploy(env=env).status == 0
    for start in ("docker build --tag", "convox build --external"):
        assert world.call(start).env["BUILDX_NO_DEFAULT_ATTESTATIONS"] == "0"


def test_docker_aws_and_git_do_not_get_the_login_to_the_rack(world: World) -> None:
    world.add_git()
    world.add_hooks()
    assert world.deploy().status == 0
    programs = set()
    for call in world.calls:
        if call.argv[0] in ("docker", "aws", "git"):
            assert not call.env.keys() & {"CONVOX_PASSWORD", "RACK_URL"}, call.line
            programs.add(" ".join(call.argv[:2]))
        else:
            assert {"CONVOX_HOST", "CONVOX_PASSWORD"} <= call.env.keys(), call.line
    assert programs > {"docker login", "docker build", "docker push", "docker image", "git log"}
    assert programs > {"aws ecr", "docker tag", "docker version"}


def test_a_deploy_runs_the_steps_in_order(world: World) -> None:
    commit = world.add_git()
    world.write("Dockerfile", "FROM scratch\n# not committed\n")
    world.add_hooks()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    local = world.call("docker build --tag").argv[3]
    image = f"{ECR}/shop:{commit}-dirty-{SHORT_ID}"
    ecr = "--region us-east-1 --registry-id 123456789012"
    commands = world.commands()
    read_git = ["git log", "git branch", "git describe", "git rev-parse"]
    begin = commands.index("before_build")
    assert {line for line in commands[:begin] if not line.startswith("git")} == {
        "docker version --format {{.Server.Version}}",
        "aws ecr get-login-password --region us-east-1",
        f"docker login --username AWS --password-stdin {ECR}",
        "convox build --help",
        "convox releases promote --help",
        "convox api get /apps/shop",
    }
    directory = world.call("convox build --app").argv[-1]
    after_hook = commands[begin + 1 : begin + 5]
    assert [" ".join(line.split()[:2]) for line in after_hook] == read_git  # it may have committed
    assert [commands[begin], *commands[begin + 5 :]] == [
        "before_build",
        f"docker build --tag {local} .",
        f"docker image inspect --format {{{{.Id}}}} {{{{.Os}}}}/{{{{.Architecture}}}} {local}",
        "after_build",
        f"docker image inspect --format {{{{.Id}}}} {{{{.Os}}}}/{{{{.Architecture}}}} {local}",
        f"docker tag {local} {image}",
        f"docker push {image}",
        f"aws ecr create-repository {ecr} --repository-name shop",
        f"docker push {image}",
        f"convox build --app shop --manifest docker-compose.yml --description {commit}-dirty Sell more --id {directory}",
        "convox api get /apps/shop",
        "convox api get /apps/shop/releases",
        "before_release",
        "convox api get /apps/shop",
        "convox releases promote --app shop --wait RNEWRELEASE",
        "convox api get /apps/shop",
        f"docker image rm --no-prune {local}",
    ]
    assert re.fullmatch(r"shop:deploy-[0-9a-f]{8}", local)


def test_only_the_rewritten_manifest_is_uploaded(world: World) -> None:
    assert world.deploy().status == 0
    build = world.call("convox build --app")
    assert build.cwd == str(world.app)  # where the CLI looks for the app's local settings
    assert list(build.upload) == ["docker-compose.yml"]
    assert build.upload["docker-compose.yml"] == COMPOSE.replace("TAG", SHORT_ID)
    assert Path(world.app, "docker-compose.yml").read_text() == COMPOSE
    assert not Path(build.argv[-1]).exists()


def test_convox_can_read_the_commit_although_only_the_manifest_is_uploaded(world: World) -> None:
    """The v2 and v3 CLIs run `git -C DIRECTORY rev-parse HEAD` to set BUILD_GIT_SHA."""
    commit = world.add_git()
    assert world.deploy().status == 0
    env = {**os.environ, "GIT_DIR": world.call("convox build --app").env["GIT_DIR"]}
    command = ["git", "-C", "/", "rev-parse", "--short", "HEAD"]
    assert (
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
        == commit
    )
    assert "GIT_DIR" not in world.call("docker build --tag").env


def test_git_dir_is_not_set_outside_a_git_repository(world: World) -> None:
    assert world.deploy().status == 0
    assert "GIT_DIR" not in world.call("convox build --app").env


def test_hooks_get_the_deploy_variables_and_the_callers_environment(world: World) -> None:
    commit = world.add_git()
    world.add_hooks()
    ran = world.deploy(env={"CALLERS": "own", "RACK_NAME": "staging"})
    assert ran.status == 0, ran.text
    before_build, after_build, before_release = (
        world.call(name).env for name in ("before_build", "after_build", "before_release")
    )
    for env in (before_build, after_build, before_release):
        assert (env["APP_NAME"], env["RACK_NAME"], env["CONVOX_RACK"]) == (
            "shop",
            "staging",
            "staging",
        )
        assert (env["GIT_BRANCH"], env["GIT_DESCRIPTION"]) == ("main", f"{commit} Sell more")
        assert env["GIT_HASH"].startswith(commit) and len(env["GIT_HASH"]) == 40
        assert (env["CALLERS"], env["CONVOX_HOST"]) == ("own", "rack.example.com")
    assert "DOCKER_TAG" not in before_build
    assert (
        after_build["DOCKER_TAG"] == after_build["DOCKER_TAG_WEB"] == before_release["DOCKER_TAG"]
    )
    assert "RELEASE_ID" not in after_build
    assert before_release["RELEASE_ID"] == "RNEWRELEASE"


def test_hooks_inherit_stdin_and_convox_does_not(world: World, tmp_path: Path) -> None:
    world.add_hooks("before_release")
    answer = tmp_path / "answer"
    answer.write_text("yes\n")
    with answer.open() as stdin:
        assert world.deploy(stdin=stdin).status == 0
    assert world.call("before_release").stdin == "yes"
    assert {call.stdin for call in world.calls if call.argv[0] == "convox"} == {""}


@pytest.mark.parametrize(
    ("env", "branch"),
    [
        ({"GIT_BRANCH": "origin/production"}, "production"),
        ({"BRANCH_NAME": "main", "GIT_BRANCH": "origin/x"}, "main"),
        ({"GITHUB_HEAD_REF": "feature", "GITHUB_REF_NAME": "7/merge"}, "feature"),
        ({"CI_COMMIT_REF_NAME": "v1"}, "v1"),
        ({"CIRCLE_TAG": "v1"}, "v1"),
        ({"BITBUCKET_TAG": "v1"}, "v1"),
        ({"TAG_NAME": "v1"}, "v1"),
        ({}, ""),
    ],
)
def test_the_branch_comes_from_ci_variables_if_head_is_detached(
    world: World, env: dict[str, str | None], branch: str
) -> None:
    world.add_git()
    world.add_hooks("before_build")
    (world.app / ".git" / "HEAD").write_text(
        (world.app / ".git" / "refs" / "heads" / "main").read_text()
    )
    assert world.deploy(env=env).status == 0
    assert world.call("before_build").env["GIT_BRANCH"] == branch


def test_the_ecr_password_is_passed_only_on_stdin(world: World) -> None:
    ran = world.deploy()
    assert world.call("docker login").stdin == "token-of-ecr"
    assert not TOKEN.search(ran.text)
    assert not any(TOKEN.search(call.line) for call in world.calls)


def test_host_and_password_are_also_passed_as_a_rack_url(world: World) -> None:
    assert world.deploy().status == 0
    env = world.call("convox build --app").env
    assert env["RACK_URL"] == "https://convox:the%2Frack%27s%20secret@rack.example.com"
    assert (env["CONVOX_HOST"], env["CONVOX_PASSWORD"]) == ("rack.example.com", "the/rack's secret")


def test_registries_other_than_ecr_do_not_need_aws(world: World) -> None:
    world.write("docker-compose.yml", "web:\n  image: localhost:5000/shop:TAG\n")
    (world.bin / "aws").unlink()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert world.commands("docker push", "docker login") == [
        f"docker push localhost:5000/shop:{SHORT_ID}"
    ]


def test_ecr_regions_and_accounts_are_taken_from_the_host_names(world: World) -> None:
    hosts = [
        "111111111111.dkr.ecr.eu-west-1.amazonaws.com",
        "222222222222.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
        "333333333333.dkr.ecr.cn-north-1.amazonaws.com.cn",
        "444444444444.dkr-ecr.ap-southeast-2.on.aws",
    ]
    world.write(
        "docker-compose.yml",
        "".join(f"s{n}:\n  image: {host}/a/b:TAG\n" for n, host in enumerate(hosts)),
    )
    ran = world.deploy()
    assert ran.status == 0, ran.text
    regions = ["eu-west-1", "us-gov-west-1", "cn-north-1", "ap-southeast-2"]
    assert set(world.commands("aws ecr get-login")) == {
        f"aws ecr get-login-password --region {r}" for r in regions
    }
    assert sorted(line.split()[-1] for line in world.commands("docker login")) == hosts
    assert len(world.commands("docker push")) == 8
    assert set(world.commands("aws ecr create")) == {
        f"aws ecr create-repository --region {region} --registry-id {host[:12]} --repository-name a/b"
        for host, region in zip(hosts, regions)
    }
    assert len(world.commands("docker build --tag")) == 1


@pytest.mark.parametrize("with_aws", [True, False])
def test_the_ecr_login_can_be_skipped(world: World, with_aws: bool) -> None:
    if not with_aws:
        (world.bin / "aws").unlink()
    ran = world.deploy(env={"SKIP_ECR_AUTH": "1"})
    assert ran.status == 0, ran.text
    assert world.commands("docker login", "aws") == []


def test_services_with_equal_build_settings_share_one_build_and_one_push(world: World) -> None:
    world.write(
        "docker-compose.yml",
        f"services:\n  web: {{build: ., image: {ECR}/shop:TAG}}\n  worker: {{build: {{context: .}}, image: {ECR}/shop:TAG}}\n",
    )
    assert world.deploy().status == 0
    assert len(world.commands("docker build --tag")) == len(world.commands("docker tag")) == 1


def test_each_build_is_passed_to_docker_with_its_own_options(world: World) -> None:
    world.write("worker/Dockerfile.worker", "FROM scratch\n")
    world.write(
        "docker-compose.yml",
        f"""
services:
  web:
    image: {ECR}/shop:TAG
  worker:
    image: {ECR}/shop-worker:TAG
    build:
      context: worker
      dockerfile: Dockerfile.worker
      target: run
      args:
        FLAVOUR: sour cream
        SECRET_OF_CALLER:
""",
    )
    world.add_hooks("after_build")
    ran = world.deploy("--", "--cache-from", "shop:cache", "--platform=linux/amd64")
    assert ran.status == 0, ran.text
    builds = [call.argv[4:] for call in world.calls if call.line.startswith("docker build --tag")]
    extra = ["--cache-from", "shop:cache", "--platform=linux/amd64"]
    assert builds == [
        [*extra, "."],
        [
            *("--file", "worker/Dockerfile.worker"),
            *("--build-arg", "FLAVOUR=sour cream", "--build-arg", "SECRET_OF_CALLER"),
            *("--target", "run", *extra, "worker"),
        ],
    ]
    env = world.call("after_build").env
    assert env["DOCKER_TAG"] == env["DOCKER_TAG_WEB"] != env["DOCKER_TAG_WORKER"]
    pushed = {line.split()[-1] for line in world.commands("docker push")}
    assert pushed == {f"{ECR}/shop:{SHORT_ID}", f"{ECR}/shop-worker:{SHORT_ID}"}
    assert list(world.call("convox build --app").upload) == ["docker-compose.yml"]


def test_a_custom_tag_is_used_unchanged(world: World) -> None:
    assert world.deploy(env={"IMAGE_TAG": "v1.2.3"}).status == 0
    assert set(world.commands("docker push")) == {f"docker push {ECR}/shop:v1.2.3"}


def test_characters_that_are_not_valid_in_a_tag_are_replaced(world: World) -> None:
    world.rules["git describe"] = {"out": "feature/ä b@c\n"}
    world.add_git()
    assert world.deploy().status == 0
    assert set(world.commands("docker push")) == {f"docker push {ECR}/shop:feature-b-c-{SHORT_ID}"}


def test_the_release_description_ends_with_the_ci_run_url(world: World) -> None:
    commit = world.add_git()
    assert world.deploy(env={"BUILD_URL": "https://jenkins/job/shop/7/"}).status == 0
    argv = world.call("convox build --app").argv
    about = f"{commit} Sell more https://jenkins/job/shop/7/"
    assert argv[argv.index("--description") + 1] == about


def test_a_commit_subject_can_contain_unicode_in_any_locale(world: World) -> None:
    world.add_git("Größe 世界")
    ran = world.deploy(env={"LC_ALL": "C", "LANG": "C"})
    assert ran.status == 0, ran.text
    argv = world.call("convox build --app").argv
    description = os.fsencode(
        argv[argv.index("--description") + 1]
    )  # the stand-in's locale is C too
    assert description.decode().endswith("Größe 世界")


def test_no_promote_stops_after_the_release_is_built(world: World) -> None:
    world.add_hooks()
    ran = world.deploy("--no-promote")
    assert ran.status == 0, ran.text
    assert world.commands("before_release", "convox releases promote --app") == []
    assert "Built release RNEWRELEASE, and did not promote it." in ran.out


def test_a_dry_run_shows_every_command_and_changes_nothing(world: World) -> None:
    world.add_hooks()
    world.add_git()
    ran = world.deploy("--dry-run")
    assert ran.status == 0, ran.text
    changing = (
        "docker build",
        "docker login",
        "docker tag",
        "docker push",
        "docker image",
        "aws ecr create",
    )
    assert (
        world.commands(
            *changing, "convox build --app", "convox releases promote --app", "before", "after"
        )
        == []
    )
    shown = [shlex.split(line[2:]) for line in ran.out.splitlines() if line.startswith("$ ")]
    assert [" ".join(words[:3]) for words in shown] == [
        "aws ecr get-login-password",
        "deploy/before_build.sh",
        "docker build --tag",
        "deploy/after_build.sh",
        f"docker push {shown[4][2]}",
        "convox build --app",
        "deploy/before_release.sh",
        "convox releases promote",
    ]
    image = shown[4][2]
    assert image.endswith("-IMAGE_ID")
    assert f"\n   web:\n-    image: {ECR}/shop:TAG\n+    image: {image}\n   redis:\n" in ran.out
    assert ran.out.endswith("\nDry run: nothing was changed.\n")
    assert world.nothing_is_left()


def test_a_dry_run_shows_the_plan_even_if_programs_are_missing(world: World) -> None:
    for program in ("docker", "aws", "convox"):
        (world.bin / program).unlink()
    ran = world.deploy("--dry-run")
    assert ran.status == 2
    assert "$ convox releases promote" in ran.out
    for program in ("docker", "aws", "convox"):
        assert re.search(rf"^ *- .*\b{program}\b", ran.err, re.MULTILINE)
    assert "\npreflight failed:\n" in ran.err and "\nNothing has been changed.\n" in ran.err


def test_a_dry_run_with_an_invalid_setting_shows_no_plan(world: World) -> None:
    ran = world.deploy("--dry-run", "--tag", "a/b")
    assert ran.status == 2
    assert "$ " not in ran.out and "--tag: 'a/b' is not an image tag: up to 128 " in ran.err
    assert world.calls == []


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_a_git_hook_does_not_make_the_tool_read_another_repository(
    world: World, name: str, tmp_path: Path
) -> None:
    commit = world.add_git()
    other = tmp_path / "other"
    git = [REAL_GIT, "-c", "user.name=x", "-c", "user.email=x", "-C", str(other)]
    subprocess.run([REAL_GIT, "init", "--quiet", other], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "Other"], check=True)
    place = {"GIT_DIR": ".git", "GIT_WORK_TREE": "", "GIT_INDEX_FILE": ".git/index"}[name]
    ran = world.deploy(env={name: str(other / place)})
    assert ran.status == 0, ran.text
    argv = world.call("convox build --app").argv
    assert argv[argv.index("--description") + 1] == f"{commit} Sell more"
    assert f":{commit}-{SHORT_ID}" in world.commands("docker push")[0]


def test_the_platform_of_a_service_goes_to_docker_build(world: World) -> None:
    world.write("docker-compose.yml", f"web:\n  image: {ECR}/shop:TAG\n  platform: linux/arm64\n")
    assert world.deploy("--", "--pull").status == 0
    assert world.call("docker build --tag").argv[4:] == ["--platform", "linux/arm64", "--pull", "."]


def test_build_keys_that_leave_the_image_the_same_are_ignored(world: World) -> None:
    build = "{context: ., cache_from: [x], cache_to: [x], tags: [x], labels: {a: b}}"
    world.write("docker-compose.yml", f"web:\n  image: {ECR}/shop:TAG\n  build: {build}\n")
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert world.call("docker build --tag").argv[4:] == ["."]
    assert "cache_from" not in ran.text


def test_docker_aws_and_git_get_the_callers_environment(world: World) -> None:
    world.add_git()
    assert (
        world.deploy(env={"DOCKER_CONFIG": "/a", "AWS_PROFILE": "b", "HTTPS_PROXY": "c"}).status
        == 0
    )
    for start in ("docker build --tag", "docker login", "aws ecr get-login", "git describe"):
        env = world.call(start).env
        assert (env["DOCKER_CONFIG"], env["AWS_PROFILE"], env["HTTPS_PROXY"]) == ("/a", "b", "c")
