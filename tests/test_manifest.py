"""Which services are ours to build, how, and what of the manifest changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ECR

from convox_deploy import Build, DeployError, Manifest, read_manifest

IMAGE = f"{ECR}/shop:TAG"


def read(tmp_path: Path, text: str | bytes, name: str = "docker-compose.yml") -> Manifest:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(str(path))


def tagged(manifest: Manifest, tag: str = "1a2b3c") -> str:
    return manifest.with_tags({service.tag_offset: tag for service in manifest.services})


def problem_of(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(DeployError) as caught:
        read(tmp_path, text)
    return str(caught.value).replace(str(tmp_path / "docker-compose.yml"), "MANIFEST")


SHAPES = {
    "compose v1": "web:\n  image: {image}\nredis:\n  image: redis:7\n",
    "compose v2": "version: '2'\nservices:\n  web:\n    image: {image}\n  redis:\n    image: redis:7\n",
    "compose v3 and networks": "version: '3'\nservices:\n  web:\n    image: {image}\nnetworks:\n  default: {{}}\n",
    "convox.yml": "resources:\n  db:\n    type: postgres\nservices:\n  web:\n    image: {image}\n    port: 3000\n",
    "single quotes": "services:\n  web:\n    image: '{image}'\n",
    "double quotes": 'services:\n  web:\n    image: "{image}"\n',
    "flow style": "services: {{web: {{image: {image}, ports: [80:80]}}}}\n",
    "a comment behind": "services:\n  web:\n    image: {image} # ends in :TAG\n",
    "TAG elsewhere": "# TAG\nservices:\n  web:\n    image: {image}\n    environment:\n      - TAG=TAG\n      - X=:TAG\n",
    "an anchor": "services:\n  web:\n    image: &shop {image}\n",
    "a tag property": "services:\n  web:\n    image: !!str {image}\n",
    "a folded block": "services:\n  web:\n    image: >-\n      {image}\n    command: x\n",
    "a literal block": "services:\n  web:\n    image: |-\n      {image}\n",
    "windows line ends": "services:\r\n  web:\r\n    image: {image}\r\n    command: x\r\n",
    "a byte order mark": "\ufeffservices:\n  web:\n    image: {image}\n",
    "letters of any kind": "# Grüße, 世界 🚢\nservices:\n  web:\n    labels: ['ü', '🚢']\n    image: {image}\n",
    "no line end at the end": "services:\n  web:\n    image: {image}",
    "a key with quotes": "services:\n  'web':\n    \"image\": {image}\n",
    "an explicit key": "services:\n  web:\n    ? image\n    : {image}\n",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_tag_of_the_image_changes(tmp_path: Path, shape: str) -> None:
    manifest = read(tmp_path, SHAPES[shape].format(image=IMAGE))
    assert [(service.name, service.repository) for service in manifest.services] == [("web", f"{ECR}/shop")]
    assert tagged(manifest) == SHAPES[shape].format(image=f"{ECR}/shop:1a2b3c")


def test_a_service_gets_its_image_through_a_merge_key(tmp_path: Path) -> None:
    text = f"x-base: &base\n  image: {IMAGE}\nservices:\n  web:\n    <<: *base\n  worker:\n    <<: [*base]\n    command: work\n"
    manifest = read(tmp_path, text)
    assert [service.name for service in manifest.services] == ["web", "worker"]
    assert tagged(manifest) == text.replace("TAG", "1a2b3c")


def test_own_keys_win_over_merged_ones_and_earlier_merges_over_later_ones(tmp_path: Path) -> None:
    manifest = read(
        tmp_path,
        f"""
x-one: &one {{image: {ECR}/one:TAG, build: {{target: one}}}}
x-two: &two {{image: {ECR}/two:TAG, build: {{target: two}}}}
services:
  first: {{<<: [*one, *two]}}
  own: {{<<: *two, image: {ECR}/own:TAG}}
""",
    )
    repositories_and_targets = [(s.repository, s.build.target) for s in manifest.services]
    assert repositories_and_targets == [(f"{ECR}/one", "one"), (f"{ECR}/own", "two")]


def test_services_that_share_an_image_by_alias_are_edited_once(tmp_path: Path) -> None:
    text = f"services:\n  web:\n    image: &image {IMAGE}\n  worker:\n    image: *image\n"
    manifest = read(tmp_path, text)
    assert len({service.tag_offset for service in manifest.services}) == 1
    assert tagged(manifest) == text.replace("TAG", "1a2b3c")


def test_images_that_are_not_ours_stay(tmp_path: Path) -> None:
    text = (
        f"web:\n  image: {IMAGE}\nredis:\n  image: redis\ndb:\n  image: 'postgres:16'\nold:\n  image: {ECR}/x:TAGGED\n"
    )
    manifest = read(tmp_path, text)
    assert tagged(manifest) == text.replace(IMAGE, f"{ECR}/shop:1a2b3c")


BUILDS = {
    "": Build(),
    "build: app": Build("app"),
    "build: ''": Build("."),
    "build: ~": Build("."),
    "build: {context: , target: null}": Build("."),
    "build: {context: app}": Build("app"),
    "build: {context: app, dockerfile: D.prod, target: run}": Build("app", "D.prod", (), "run"),
    "build: {path: app, manifest: D.prod}": Build("app", "D.prod"),
    "build: {context: ., args: {A: 1, B: 'two words', C: }}": Build(".", None, ("A=1", "B=two words", "C")),
    "build: {context: ., args: [A=1, B]}": Build(".", None, ("A=1", "B")),
    "build: {context: ., args: {YES: yes, VERSION: 1.10, OCTAL: 010}}": Build(
        ".", None, ("YES=yes", "VERSION=1.10", "OCTAL=010")
    ),
    "build: .\n    dockerfile: D.prod": Build(".", "D.prod"),
    "build: https://example.com/app.git#main": Build("https://example.com/app.git#main"),
}


@pytest.mark.parametrize("written", BUILDS)
def test_a_build_is_read_as_written(tmp_path: Path, written: str) -> None:
    [service] = read(tmp_path, f"services:\n  web:\n    image: {IMAGE}\n    {written}\n").services
    assert service.build == BUILDS[written]


def test_a_dockerfile_is_relative_to_its_context() -> None:
    assert Build("worker", "Dockerfile.prod").file == "worker/Dockerfile.prod"
    assert Build("https://example.com/app.git", "Dockerfile.prod").file == "Dockerfile.prod"
    assert Build("worker").file is None


def service(text: str) -> str:
    return f"services:\n  web:\n    {text}\n"


PROBLEMS = {
    "just a text": "MANIFEST has no services in it. Is it a docker-compose.yml or a convox.yml?",
    "[a, list]": "MANIFEST has no services in it. Is it a docker-compose.yml or a convox.yml?",
    "a: b: c": "MANIFEST is not valid YAML, line 1: mapping values are not allowed here.",
    "a: 'b": "MANIFEST is not valid YAML, line 1: found unexpected end of stream.",
    "a: *nobody": "MANIFEST is not valid YAML, line 1: found undefined alias 'nobody'.",
    "a: \x00": "MANIFEST is not valid YAML: unacceptable character #x0000: special characters are not allowed.",
    "services: &s\n  <<: *s": "MANIFEST is nested too deeply, or a merge key in it leads back to itself.",
    service("image: redis:7 # :TAG"): (
        "MANIFEST has no image that ends in :TAG, so there is nothing to build."
        " Write image: <account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", PROBLEMS)
def test_other_writings_of_a_mistake_get_its_message_too(tmp_path: Path, text: str) -> None:
    """The messages themselves are in messages.txt."""
    assert problem_of(tmp_path, text) == PROBLEMS[text]


def test_a_character_beyond_unicode_is_a_mistake_too(tmp_path: Path) -> None:
    assert problem_of(tmp_path, 'services: "\\UFFFFFFFF"').startswith("MANIFEST ")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, "services:\n  a:\n    build: .\n  b:\n    image: b:TAG\n  b2: {x: 1, x: 2}\n")
    assert [line.split(":")[0] for line in problem.splitlines()] == [
        "MANIFEST line 6",
        "MANIFEST service a",
        "MANIFEST service b",
    ]


def test_aliases_to_aliases_do_not_explode(tmp_path: Path) -> None:
    lines = [f"x0: &x0 {{image: {IMAGE}}}"]
    lines += [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}" for n in range(1, 40)]
    manifest = read(tmp_path, "\n".join([*lines, "services:", "  web:", "    <<: *x39"]))
    assert [service.name for service in manifest.services] == ["web"]
