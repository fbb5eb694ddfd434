"""Hooks: which files are hooks, what they can change, and that none is skipped silently."""

from __future__ import annotations

import pytest
from conftest import COMPOSE, ECR, World


@pytest.mark.parametrize(
    ("hook", "victim"),
    [
        ("before_build", "after_build"),
        ("before_build", "before_release"),
        ("after_build", "before_release"),
    ],
)
def test_a_hook_that_disappears_fails_the_deploy(world: World, hook: str, victim: str) -> None:
    world.add_hooks(victim)
    world.write(f"deploy/{hook}.sh", f"#!/bin/sh\n/bin/rm deploy/{victim}.sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 1
    assert f"{victim} failed:\nCannot run deploy/{victim}.sh: it is not installed" in ran.err
    assert world.commands("convox releases promote --app") == []


def test_a_hook_created_by_another_hook_is_run_or_reported(world: World) -> None:
    world.write(
        "deploy/before_build.sh", "#!/bin/sh\n/bin/cp after.sh deploy/after_build.sh\n", 0o755
    )
    world.write("after.sh", "#!/bin/sh\necho the second hook\n", 0o755)
    assert "the second hook" in world.deploy().out
    (world.app / "deploy" / "after_build.sh").unlink()
    world.write("after.sh", "#!/bin/sh\n")
    ran = world.deploy()
    assert ran.status == 1
    assert "Cannot run deploy/after_build.sh: it is not installed" in ran.err
    assert "or not executable." in ran.err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 0\n", "Exec format error"),
        ("#!/no/such/shell\n", "No such file or directory"),
        ("#!/bin/sh\r\nexit 0\r\n", "No such file or directory"),
    ],
)
def test_a_hook_that_cannot_be_started_fails_the_deploy(world: World, text: str, why: str) -> None:
    """It has no shebang line, one that names nothing, or Windows line endings. Another hook has written it."""
    world.write("after.sh", text, 0o755)
    world.write(
        "deploy/before_build.sh", "#!/bin/sh\n/bin/cp after.sh deploy/after_build.sh\n", 0o755
    )
    ran = world.deploy()
    assert ran.status == 1
    fix = "Its first line must be #! and an installed interpreter, and end in LF."
    assert f"after_build failed:\nCannot run deploy/after_build.sh: {why}. {fix}\n" in ran.err
    assert "Traceback" not in ran.text and world.commands("docker push") == []


@pytest.mark.parametrize(
    "name",
    [
        *("before-build.sh", "beforebuild.sh", "before_build", "Before_build.sh", "befor_build.sh"),
        *("before_build.rb", "before_build.sh.sh", "before_build.sh.erb", "BEFORE_BUILD.SH"),
    ],
)
def test_a_misnamed_hook_is_reported(world: World, name: str) -> None:
    world.write(f"deploy/{name}", "#!/bin/sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 2
    assert f"deploy/{name} is never run. Rename it to deploy/before_build.sh.\n" in ran.err


@pytest.mark.parametrize("name", ["Deploy", "DEPLOY"])
def test_a_misnamed_directory_is_reported(world: World, name: str) -> None:
    world.write(f"{name}/before_build.sh", "#!/bin/sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 2
    right = "deploy/before_build.sh"
    assert f"{name}/before_build.sh is never run. Rename it to {right}.\n" in ran.err


def test_hooks_in_another_directory_beside_deploy_are_reported(world: World) -> None:
    world.write("deploy/README.md", "Our servers.\n")
    world.write("Deploy/before_build.sh", "#!/bin/sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 2
    right = "deploy/before_build.sh"
    assert f"Deploy/before_build.sh is never run. Rename it to {right}.\n" in ran.err


def test_a_directory_of_a_similar_name_may_have_other_files(world: World) -> None:
    world.write("Deploy/README.md", "Our servers.\n")
    world.write("DEPLOY", "How we deploy.\n")
    assert world.deploy().status == 0


def test_files_beside_a_hook_of_that_name_are_ignored(world: World) -> None:
    world.add_hooks()
    for name in ("before_build.sh.bak", "before-build.sh", "before_build.rb"):
        world.write(f"deploy/{name}", "#!/bin/sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_other_files_in_the_hooks_directory_are_ignored(world: World) -> None:
    for name in ("lib.sh", "build.sh", "README.md", "release.sh", "functions", "deploy.sh"):
        world.write(f"deploy/{name}", "")
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_a_hook_can_be_a_symlink_to_a_script(world: World) -> None:
    world.write("shared/hook.sh", "#!/bin/sh\necho shared\n", 0o755)
    (world.app / "deploy").mkdir()
    (world.app / "deploy" / "after_build.sh").symlink_to("../shared/hook.sh")
    assert "\nshared\n" in world.deploy().out


# --- hooks that edit the manifest -----------------------------------------------------

OTHER = ECR.replace("us-east-1", "eu-west-1")


def edit(world: World, hook: str, new: str) -> None:
    world.write("new.yml", new)
    world.write(f"deploy/{hook}.sh", "#!/bin/sh\n/bin/cp new.yml docker-compose.yml\n", 0o755)


def test_manifest_edits_in_before_build_take_effect(world: World) -> None:
    edit(
        world,
        "before_build",
        COMPOSE.replace(f"{ECR}/shop", f"{OTHER}/edited").replace("redis:7", "redis:8"),
    )
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert [line.split()[-1] for line in world.commands("docker login")] == [ECR, OTHER]
    assert all(f"{OTHER}/edited:" in line for line in world.commands("docker push"))
    upload = world.call("convox build --app").upload["docker-compose.yml"]
    assert f"image: {OTHER}/edited:" in upload and "redis:8" in upload


def test_a_manifest_broken_by_before_build_is_reported_before_the_build(world: World) -> None:
    edit(world, "before_build", COMPOSE + f"  api:\n    image: {ECR}/api:TAG\n    build: nowhere\n")
    ran = world.deploy()
    assert ran.status == 1
    assert "build failed:\nBuild context 'nowhere' is not a directory." in ran.err
    assert world.commands("docker build --tag") == []


def test_editing_the_manifest_in_after_build_is_an_error(world: World) -> None:
    edit(world, "after_build", COMPOSE.replace("redis:7", "redis:8"))
    ran = world.deploy()
    assert ran.status == 1
    assert "docker-compose.yml has changed." in ran.err
    assert world.commands("docker push", "convox build --app") == []


def test_before_build_can_create_the_dockerfile(world: World) -> None:
    (world.app / "Dockerfile").unlink()
    world.write("deploy/before_build.sh", "#!/bin/sh\necho FROM scratch >Dockerfile\n", 0o755)
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_hooks_that_do_not_edit_the_manifest_cause_no_second_login(world: World) -> None:
    world.add_hooks()
    assert world.deploy().status == 0
    assert len(world.commands("docker login")) == 1


def test_before_build_can_create_the_manifest(world: World) -> None:
    (world.app / "docker-compose.yml").rename(world.app / "template.yml")
    script = "#!/bin/sh\n/bin/cp template.yml docker-compose.yml\n"
    world.write("deploy/before_build.sh", script, 0o755)
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands("docker login")) == 1
    (world.app / "docker-compose.yml").unlink()
    world.write("deploy/before_build.sh", "#!/bin/sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 1 and "build failed:\ndocker-compose.yml is not a file" in ran.err


@pytest.mark.parametrize(
    "args", [["--dry-run"], ["--release", "RABCDEFGHIJ"], ["--from", "x.json"]]
)
def test_a_missing_manifest_is_an_error_where_before_build_does_not_run(
    world: World, args: list[str]
) -> None:
    (world.app / "docker-compose.yml").unlink()
    world.add_hooks("before_build")
    ran = world.deploy(*args)
    assert ran.status == 2 and "docker-compose.yml is not a file" in ran.err
