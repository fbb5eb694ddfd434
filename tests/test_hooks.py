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
    assert f"Cannot run deploy/{victim}.sh. It must be an executable script." in ran.err
    assert world.commands("convox releases promote --app") == []


def test_a_hook_created_by_another_hook_is_run_or_reported(world: World) -> None:
    world.write(
        "deploy/before_build.sh", "#!/bin/sh\n/bin/cp after.sh deploy/after_build.sh\n", 0o755
    )
    world.write("after.sh", "#!/bin/sh\necho the second hook\n", 0o755)
    assert "the second hook" in world.deploy().out
    (world.app / "deploy" / "after_build.sh").unlink()
    world.write("after.sh", "echo the second hook\n", 0o755)
    ran = world.deploy()
    assert ran.status == 1 and "deploy/after_build.sh has no shebang line." in ran.err


@pytest.mark.parametrize(
    "name",
    ["before-build.sh", "beforebuild.sh", "before_build", "Before_build.sh", "befor_build.sh"],
)
def test_a_misnamed_hook_is_reported(world: World, name: str) -> None:
    world.write(f"deploy/{name}", "#!/bin/sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 2
    assert (
        f"deploy/{name} is never run. Rename it to deploy/before_build.sh to make it a hook."
        in ran.err
    )


@pytest.mark.parametrize(
    "name", ["lib.sh", "build.sh", "before_build.sh.bak", "README.md", "release.sh", "functions"]
)
def test_other_files_in_the_hooks_directory_are_ignored(world: World, name: str) -> None:
    world.write(f"deploy/{name}", "")
    assert world.deploy().status == 0


@pytest.mark.parametrize(
    "first_line",
    [
        "#!/bin/sh",
        "#! /bin/sh -e",
        "#!/usr/bin/env sh",
        "#!/usr/bin/env -S sh -e",
        "#!/usr/bin/env NAME=value sh",
    ],
)
def test_any_working_shebang_line_is_accepted(world: World, first_line: str) -> None:
    world.write("deploy/before_build.sh", f"{first_line}\necho hello from the hook\n", 0o755)
    env = {"PATH": f"{world.bin}:/usr/bin:/bin"}
    ran = world.deploy("--dry-run", env=env)
    assert ran.status == 0, ran.text
    if "NAME" not in first_line:  # which Linux passes as a single argument
        assert "hello from the hook" in world.deploy(env=env).out


def test_a_hook_can_be_a_symlink_to_a_binary(world: World) -> None:
    (world.app / "deploy").mkdir()
    (world.app / "deploy" / "before_build.sh").symlink_to("/bin/true")
    assert world.deploy().status == 0


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
    assert [line.split()[-1] for line in world.commands("docker login")] == [ECR, ECR, OTHER]
    assert all(f"{OTHER}/edited:" in line for line in world.commands("docker push"))
    upload = world.call("convox build --app").upload["docker-compose.yml"]
    assert f"image: {OTHER}/edited:" in upload and "redis:8" in upload


def test_a_manifest_broken_by_before_build_is_reported_before_the_build(world: World) -> None:
    edit(world, "before_build", COMPOSE + f"  api:\n    image: {ECR}/api:TAG\n    build: nowhere\n")
    ran = world.deploy()
    assert ran.status == 1
    assert "build failed:\nBuild context 'nowhere' is not a directory." in ran.err
    assert world.commands("docker build") == []


def test_editing_the_manifest_in_after_build_is_an_error(world: World) -> None:
    edit(world, "after_build", COMPOSE.replace("redis:7", "redis:8"))
    ran = world.deploy()
    assert ran.status == 1
    assert "docker-compose.yml has changed. Edit it in deploy/before_build.sh." in ran.err
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


def test_a_hook_that_deletes_the_project_root_does_not_hide_its_failure(world: World) -> None:
    world.write("deploy/before_build.sh", '#!/bin/sh\n/bin/rm -rf "$PWD"\nexit 7\n', 0o755)
    ran = world.deploy()
    assert ran.status == 1
    assert "`deploy/before_build.sh` exited with code 7." in ran.err
    assert "Nothing was released or promoted." in ran.err


def test_services_that_share_an_image_by_alias_are_reported_before_any_hook(world: World) -> None:
    image = f"{ECR}/shop:TAG"
    world.write(
        "docker-compose.yml", f"a: {{image: &i {image}}}\nb: {{image: *i, build: {{target: b}}}}\n"
    )
    world.add_hooks("before_build")
    ran = world.deploy()
    assert ran.status == 2 and "service b would get the same image and tag" in ran.err
    assert world.commands("before_build") == []
