"""What the tool sends to docker, aws, convox, git and the hooks: the order, arguments, environment and input."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMPOSE, ECR, TOOL, World

SHORT_ID = "3cbf733dcc19"
DIGEST = "sha256:" + "d" * 64
TOKEN = re.compile("token-of-ecr")

BUILD = {
    "2016": ["--app", "shop", "--file", "docker-compose.yml", "--description", "{about}"],
    "2018": ["--app", "shop", "--file", "docker-compose.yml", "--description", "{about}", "--id"],
    "v2": ["--app", "shop", "--manifest", "docker-compose.yml", "--description", "{about}", "--id"],
    "v3": ["--app", "shop", "--manifest", "docker-compose.yml", "--description", "{about}", "--id"],
}
PROMOTE = {
    "2016": ["--app", "shop", "--wait", "RNEWRELEASE"],
    "2018": ["--app", "shop", "--wait", "RNEWRELEASE"],
    "v2": ["--app", "shop", "--wait", "RNEWRELEASE"],
    "v3": ["--app", "shop", "RNEWRELEASE"],
}


@pytest.mark.parametrize("cli", ["2016", "2018", "v2", "v3"])
def test_each_generation_of_the_cli_gets_the_options_that_it_lists(world: World, cli: str) -> None:
    commit = world.add_git()
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    convox = [call.argv[1:] for call in world.calls if call.argv[0] == "convox"]
    assert convox == [
        ["build", "--help"],
        ["releases", "promote", "--help"],
        ["api", "get", "/apps/shop"],
        ["build", *[word.format(about=f"{commit} Sell more") for word in BUILD[cli]]],
        ["releases", "promote", *PROMOTE[cli]],
        ["api", "get", "/apps/shop"],
    ]
    assert ran.out.rstrip().endswith("shop runs RNEWRELEASE.")


@pytest.mark.parametrize("cli", ["2016", "2018", "v2", "v3"])
def test_a_rack_is_named_by_variable_and_option(world: World, cli: str) -> None:
    ran = world.deploy("--rack", "org/production", env={"CONVOX_STANDIN_CLI": cli, "CONVOX_RACK": "org/staging"})
    assert ran.status == 0, ran.text
    for start in ("convox build --app", "convox releases promote --app"):
        call = world.call(start)
        assert call.argv[call.argv.index("--rack") + 1] == "org/production"
        assert call.env["CONVOX_RACK"] == "org/production"
        assert "RACK_URL" not in call.env
    assert len(world.commands("convox api get --rack org/production /apps/shop")) == 2
    assert "--rack org/production --release RNEWRELEASE" in ran.out


def test_a_deploy_runs_the_lifecycle_in_order(world: World) -> None:
    commit = world.add_git()
    world.write("Dockerfile", "FROM scratch\n# not committed\n")
    world.add_hooks()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    [local] = [call.argv[-2] for call in world.calls if call.argv[:2] == ["docker", "build"]]
    image = f"{ECR}/shop:{commit}-dirty-{SHORT_ID}"
    ecr = "--region us-east-1 --registry-id 123456789012"
    commands = [re.sub(r"--iidfile \S+", "--iidfile ...", line) for line in world.commands()]
    lookup = f"aws ecr describe-repositories {ecr} --repository-names shop"
    untag = f"docker image rm --no-prune {local}"
    begin = commands.index("before_build")
    assert {line for line in commands[:begin] if not line.startswith("git")} - {lookup} == {
        "docker version --format {{.Server.Version}}",
        "aws ecr get-login-password --region us-east-1",
        f"docker login --username AWS --password-stdin {ECR}",
        "convox build --help",
        "convox releases promote --help",
        "convox api get /apps/shop",
    }
    assert commands.count(lookup) == commands.count(untag) == 1
    assert [line for line in commands[begin:] if line not in (lookup, untag)] == [
        "before_build",
        f"docker build --iidfile ... --tag {local} .",
        "after_build",
        f"docker image inspect --format {{{{.Id}}}} {{{{.Os}}}}/{{{{.Architecture}}}} {local}",
        f"aws ecr create-repository {ecr} --repository-name shop",
        f"docker tag {local} {image}",
        f"docker push {image}",
        f"docker image inspect --format {{{{json .RepoDigests}}}} {image}",
        f"convox build --app shop --manifest docker-compose.yml --description {commit} Sell more --id",
        "before_release",
        "convox releases promote --app shop --wait RNEWRELEASE",
        "convox api get /apps/shop",
    ]
    assert re.fullmatch(r"shop:web-[0-9a-f]{8}", local)


def test_the_manifest_is_uploaded_alone_and_rewritten(world: World) -> None:
    assert world.deploy().status == 0
    build = world.call("convox build --app")
    assert list(build.upload) == ["docker-compose.yml"]
    assert build.upload["docker-compose.yml"] == COMPOSE.replace("TAG", SHORT_ID)
    assert Path(world.app, "docker-compose.yml").read_text() == COMPOSE
    assert not Path(build.cwd).exists()


def test_hooks_get_what_is_known_and_the_callers_environment(world: World) -> None:
    commit = world.add_git()
    world.add_hooks()
    ran = world.deploy(env={"CALLERS": "own", "RACK_NAME": "staging"})
    assert ran.status == 0, ran.text
    before_build, after_build, before_release = (
        world.call(name).env for name in ("before_build", "after_build", "before_release")
    )
    for env in (before_build, after_build, before_release):
        assert (env["APP_NAME"], env["RACK_NAME"], env["CONVOX_RACK"]) == ("shop", "staging", "staging")
        assert (env["GIT_BRANCH"], env["GIT_DESCRIPTION"]) == ("main", f"{commit} Sell more")
        assert env["GIT_HASH"].startswith(commit) and len(env["GIT_HASH"]) == 40
        assert (env["CALLERS"], env["CONVOX_HOST"]) == ("own", "rack.example.com")
    assert "DOCKER_TAG" not in before_build
    assert after_build["DOCKER_TAG"] == after_build["DOCKER_TAG_WEB"] == before_release["DOCKER_TAG"]
    assert "RELEASE_ID" not in after_build
    assert before_release["RELEASE_ID"] == "RNEWRELEASE"


def test_hooks_keep_the_callers_input_and_convox_gets_none(world: World, tmp_path: Path) -> None:
    world.add_hooks("before_release")
    answer = tmp_path / "answer"
    answer.write_text("yes\n")
    with answer.open() as stdin:
        assert world.deploy(stdin=stdin).status == 0
    assert world.call("before_release").stdin == "yes"
    assert {call.stdin for call in world.calls if call.argv[0] == "convox"} == {""}


def test_a_branch_is_known_where_jenkins_checks_out_a_commit(world: World) -> None:
    world.add_git()
    world.add_hooks("before_build")
    (world.app / ".git" / "HEAD").write_text((world.app / ".git" / "refs" / "heads" / "main").read_text())
    assert world.deploy(env={"GIT_BRANCH": "origin/production"}).status == 0
    assert world.call("before_build").env["GIT_BRANCH"] == "production"


def test_the_ecr_password_goes_through_stdin_alone(world: World) -> None:
    ran = world.deploy()
    assert world.call("docker login").stdin == "token-of-ecr"
    assert not TOKEN.search(ran.text)
    assert not any(TOKEN.search(call.line) for call in world.calls)


def test_host_and_password_reach_every_generation_as_a_url_too(world: World) -> None:
    assert world.deploy().status == 0
    env = world.call("convox build --app").env
    assert env["RACK_URL"] == "https://convox:the%2Frack%27s%20secret@rack.example.com"
    assert (env["CONVOX_HOST"], env["CONVOX_PASSWORD"]) == ("rack.example.com", "the/rack's secret")
    assert "RACK_URL" not in world.call("docker build").env


def test_a_deploy_needs_no_settings_where_the_cli_is_logged_in(world: World) -> None:
    ran = world.deploy(env={"APP_NAME": None, "CONVOX_HOST": None, "CONVOX_PASSWORD": None})
    assert ran.status == 0, ran.text
    build = world.call("convox build --app shop")  # the directory's name
    assert not {"RACK_URL", "CONVOX_RACK", "CONVOX_HOST"} & build.env.keys()


def test_a_registry_other_than_ecr_needs_no_aws(world: World) -> None:
    world.write("docker-compose.yml", "web:\n  image: localhost:5000/shop:TAG\n")
    (world.bin / "aws").unlink()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert world.commands("docker push", "docker login") == [f"docker push localhost:5000/shop:{SHORT_ID}"]


def test_ecr_regions_and_accounts_come_from_the_host_names(world: World) -> None:
    hosts = [
        "111111111111.dkr.ecr.eu-west-1.amazonaws.com",
        "222222222222.dkr.ecr-fips.us-gov-west-1.amazonaws.com",
        "333333333333.dkr.ecr.cn-north-1.amazonaws.com.cn",
        "444444444444.dkr-ecr.ap-southeast-2.on.aws",
    ]
    world.write("docker-compose.yml", "".join(f"s{n}:\n  image: {host}/a/b:TAG\n" for n, host in enumerate(hosts)))
    ran = world.deploy()
    assert ran.status == 0, ran.text
    regions = ["eu-west-1", "us-gov-west-1", "cn-north-1", "ap-southeast-2"]
    assert set(world.commands("aws ecr get-login")) == {f"aws ecr get-login-password --region {r}" for r in regions}
    assert sorted(line.split()[-1] for line in world.commands("docker login")) == hosts
    assert set(world.commands("aws ecr create")) == {
        f"aws ecr create-repository --region {region} --registry-id {host[:12]} --repository-name a/b"
        for host, region in zip(hosts, regions)
    }
    assert len(world.commands("docker build")) == 1


@pytest.mark.parametrize("with_aws", [True, False])
def test_the_ecr_login_can_be_skipped(world: World, with_aws: bool) -> None:
    if not with_aws:
        (world.bin / "aws").unlink()
    ran = world.deploy(env={"SKIP_ECR_AUTH": "1"})
    assert ran.status == 0, ran.text
    assert world.commands("docker login", "aws ecr get-login") == []
    assert bool(world.commands("aws ecr create")) == with_aws


def test_a_repository_made_by_somebody_else_meanwhile_is_fine(world: World) -> None:
    world.rules["aws ecr create"] = {
        "usual": True,
        "status": 254,
        "err": "An error occurred (RepositoryAlreadyExistsException) ...",
    }
    assert world.deploy().status == 0


def test_where_aws_may_not_look_the_push_decides(world: World) -> None:
    (world.home / "repositories").write_text("123456789012/shop")
    world.rules["aws ecr describe"] = {"status": 254, "err": "An error occurred (AccessDeniedException) when ..."}
    ran = world.deploy()
    assert ran.status == 0
    assert "warning: aws may not look up shop in ECR; the push will tell whether that is there." in ran.out


def test_a_credential_helper_that_cannot_store_needs_no_login(world: World) -> None:
    world.rules["docker login"] = {
        "usual": True,
        "status": 1,
        "err": "error storing credentials - err: not implemented",
    }
    assert world.deploy().status == 0


def test_services_with_equal_builds_share_one_build_and_one_push(world: World) -> None:
    world.write(
        "docker-compose.yml",
        f"services:\n  web: {{build: ., image: {ECR}/shop:TAG}}\n  worker: {{build: {{context: .}}, image: {ECR}/shop:TAG}}\n",
    )
    assert world.deploy().status == 0
    assert len(world.commands("docker build")) == len(world.commands("docker push")) == 1


def test_builds_of_their_own_go_to_docker_with_their_options(world: World) -> None:
    world.write("worker/Dockerfile.worker", "FROM scratch\n")
    world.write(
        "convox.yml",
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
    builds = [call.argv[2:] for call in world.calls if call.argv[:2] == ["docker", "build"]]
    web, worker = ([re.sub("-[0-9a-f]{8}$", "-...", word) for word in words] for words in builds)
    extra = ["--cache-from", "shop:cache", "--platform=linux/amd64"]
    assert web[:3] == extra and web[-3:] == ["--tag", "shop:web-...", "."]
    assert worker[:8] == [
        *("--file", "worker/Dockerfile.worker"),
        *("--build-arg", "FLAVOUR=sour cream", "--build-arg", "SECRET_OF_CALLER"),
        *("--target", "run"),
    ]
    assert worker[8:11] == extra and worker[-3:] == ["--tag", "shop:worker-...", "worker"]
    env = world.call("after_build").env
    assert env["DOCKER_TAG"] == env["DOCKER_TAG_WEB"] != env["DOCKER_TAG_WORKER"]
    pushed = {line.split()[-1] for line in world.commands("docker push")}
    assert pushed == {f"{ECR}/shop:{SHORT_ID}", f"{ECR}/shop-worker:{SHORT_ID}"}
    assert list(world.call("convox build --app").upload) == ["convox.yml"]


def test_a_tag_of_ones_own_is_used_as_it_is(world: World) -> None:
    assert world.deploy(env={"IMAGE_TAG": "v1.2.3"}).status == 0
    assert world.commands("docker push") == [f"docker push {ECR}/shop:v1.2.3"]


def test_branch_names_and_the_like_make_a_valid_tag(world: World) -> None:
    world.rules["git describe"] = {"out": "feature/ä b@c\n"}
    world.add_git()
    assert world.deploy().status == 0
    assert world.commands("docker push") == [f"docker push {ECR}/shop:feature-b-c-{SHORT_ID}"]


def test_jenkins_build_url_is_in_the_description(world: World) -> None:
    commit = world.add_git()
    assert world.deploy(env={"BUILD_URL": "https://jenkins/job/shop/7/"}).status == 0
    argv = world.call("convox build --app").argv
    assert argv[argv.index("--description") + 1] == f"{commit} Sell more https://jenkins/job/shop/7/"


def test_a_commit_may_be_described_in_any_language_in_any_locale(world: World) -> None:
    world.add_git("Größe 世界")
    ran = world.deploy(env={"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert ran.status == 0, ran.text
    argv = world.call("convox build --app").argv
    description = os.fsencode(argv[argv.index("--description") + 1])  # the stand-in's locale is C too
    assert description.decode().endswith("Größe 世界")


def test_no_promote_stops_once_the_release_is_built(world: World) -> None:
    world.add_hooks()
    ran = world.deploy("--no-promote")
    assert ran.status == 0, ran.text
    assert world.commands("before_release", "convox releases promote --app") == []
    assert "Release RNEWRELEASE is built and not promoted." in ran.out


def test_the_way_to_go_on_is_said_before_anything_else_happens_and_works(world: World) -> None:
    world.add_hooks()
    world.rules["before_release"] = {"status": 3}
    ran = world.deploy()
    assert ran.status == 1
    header = ran.out.index("==> [6/7] before_release")
    way_on = ran.out[:header].strip().splitlines()[-1].split()
    assert way_on[1:] == ["--app", "shop", "--release", "RNEWRELEASE"]
    world.rules.clear()
    (world.home / "calls").unlink()
    ran = world.deploy(*way_on[1:])
    assert ran.status == 0, ran.text
    assert [line for line in world.commands() if not line.startswith("git")] == [
        "convox build --help",
        "convox releases promote --help",
        "convox api get /apps/shop",
        "before_release",
        "convox releases promote --app shop --wait RNEWRELEASE",
        "convox api get /apps/shop",
    ]
    assert world.call("before_release").env["RELEASE_ID"] == "RNEWRELEASE"


def test_a_dry_run_shows_every_command_and_changes_nothing(world: World) -> None:
    world.add_hooks()
    world.add_git()
    ran = world.deploy("--dry-run", "--result", "result.json")
    assert ran.status == 0, ran.text
    changing = ("docker build", "docker login", "docker tag", "docker push", "docker image", "aws ecr create")
    assert world.commands(*changing, "convox build --app", "convox releases promote --app", "before", "after") == []
    shown = [shlex.split(line[2:].split(" && ")[-1]) for line in ran.out.splitlines() if line.startswith("$ ")]
    assert [" ".join(words[:3]) for words in shown] == [
        "aws ecr get-login-password",
        "deploy/before_build.sh",
        "docker build --iidfile",
        "deploy/after_build.sh",
        "aws ecr create-repository",
        f"docker tag {shown[2][-2]}",
        f"docker push {shown[6][2]}",
        "convox build --app",
        "deploy/before_release.sh",
        "convox releases promote",
    ]
    image = shown[6][2]
    assert f"\n   web:\n-    image: {ECR}/shop:TAG\n+    image: {image}\n   redis:\n" in ran.out
    assert image.endswith("-IMAGE_ID") and "IMAGE_ID and RELEASE_ID stand for what is known once" in ran.out
    assert "RELEASE_ID=RELEASE_ID" in ran.out
    assert world.nothing_is_left() and not (world.app / "result.json").exists()


def test_a_dry_run_shows_the_plan_even_where_nothing_can_be_reached(world: World) -> None:
    for program in ("docker", "aws", "convox"):
        (world.bin / program).unlink()
    ran = world.deploy("--dry-run")
    assert ran.status == 2
    assert "$ convox releases promote" in ran.out
    for program in ("docker", "aws", "convox"):
        assert f"{program} is not installed, or not on the PATH." in ran.err


def test_the_result_file_tells_of_success(world: World) -> None:
    world.add_git()
    assert world.deploy("--result", "result.json").status == 0
    result = json.loads((world.app / "result.json").read_text())
    steps = result.pop("steps")
    [push] = world.commands("docker push")
    assert result == {
        "status": "succeeded",
        "exit_status": 0,
        "app": "shop",
        "release": "RNEWRELEASE",
        "promoted": True,
        "running": "RNEWRELEASE",
        "tag": push.rpartition(":")[2],
        "images": [
            {"image": push.split()[-1], "digest": DIGEST, "platform": "linux/amd64", "services": ["web"]},
        ],
        "failed_step": None,
        "error": None,
    }
    names = ["preflight", "before_build", "build", "after_build", "push", "release", "before_release", "promote"]
    assert [step["step"] for step in steps] == names
    assert all(step["seconds"] >= 0 for step in steps)


def test_the_result_file_tells_of_failure_and_never_of_an_earlier_deploy(world: World) -> None:
    (world.app / "result.json").write_text('{"status": "succeeded"}')
    world.rules["docker push"] = {"status": 1, "err": "denied"}
    assert world.deploy(env={"DEPLOY_RESULT": "result.json"}).status == 1
    result = json.loads((world.app / "result.json").read_text())
    assert (result["status"], result["failed_step"], result["promoted"]) == ("failed", "push", False)
    assert result["error"].startswith("`docker push` failed with exit status 1.")


def test_the_way_to_go_on_can_be_typed_where_python_was_given_the_file(world: World) -> None:
    shutil.copy(TOOL, world.app)
    world.ready_standins()
    command = [sys.executable, TOOL.name, "--no-promote"]
    done = subprocess.run(command, cwd=world.app, env=world.env, capture_output=True, text=True, check=True)
    assert "\n  ./convox_deploy.py --app shop --release RNEWRELEASE\n" in done.stdout
