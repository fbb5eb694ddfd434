"""Which services are built, how they are built, and what changes in the manifest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import ECR

from convox_deploy import Build, DeployError, Manifest

IMAGE = f"{ECR}/shop:TAG"


def read(tmp_path: Path, text: str | bytes, name: str = "docker-compose.yml") -> Manifest:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Manifest.load(str(path))


def tagged(manifest: Manifest, tag: str = "1a2b3c") -> str:
    for service in manifest.services:
        service.tag = tag
    return manifest.with_tags()


def problem_of(tmp_path: Path, text: str | bytes, name: str = "docker-compose.yml") -> str:
    with pytest.raises(DeployError) as caught:
        read(tmp_path, text, name)
    return str(caught.value).replace(str(tmp_path / name), "MANIFEST")


SHAPES = {
    "compose v1": "web:\n  image: {image}\nredis:\n  image: redis:7\n",
    "compose v2": "version: '2'\nservices:\n  web:\n    image: {image}\n  redis:\n    image: redis:7\n",
    "compose v3 and networks": "version: '3'\nservices:\n  web:\n    image: {image}\nnetworks:\n  default: {{}}\n",
    "convox.yml": "resources:\n  db:\n    type: postgres\nservices:\n  web:\n    image: {image}\n    port: 3000\n",
    "single quotes": "services:\n  web:\n    image: '{image}'\n",
    "double quotes": 'services:\n  web:\n    image: "{image}"\n',
    "flow style": "services: {{web: {{image: {image}, ports: [80:80]}}}}\n",
    "a trailing comment": "services:\n  web:\n    image: {image} # ends in :TAG\n",
    "TAG elsewhere": "# TAG\nservices:\n  web:\n    image: {image}\n    environment:\n      - TAG=TAG\n      - X=:TAG\n",
    "an anchor": "services:\n  web:\n    image: &shop {image}\n",
    "a tag property": "services:\n  web:\n    image: !!str {image}\n",
    "a folded block": "services:\n  web:\n    image: >-\n      {image}\n    command: x\n",
    "a literal block": "services:\n  web:\n    image: |-\n      {image}\n",
    "Windows line endings": "services:\r\n  web:\r\n    image: {image}\r\n    command: x\r\n",
    "a byte order mark": "\ufeffservices:\n  web:\n    image: {image}\n",
    "non-ASCII characters": "# Grüße, 世界 🚢\nservices:\n  web:\n    labels: ['ü', '🚢']\n    image: {image}\n",
    "no newline at the end": "services:\n  web:\n    image: {image}",
    "quoted keys": "services:\n  'web':\n    \"image\": {image}\n",
    "an explicit key": "services:\n  web:\n    ? image\n    : {image}\n",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_image_tag_changes(tmp_path: Path, shape: str) -> None:
    manifest = read(tmp_path, SHAPES[shape].format(image=IMAGE))
    assert [(service.name, service.repository) for service in manifest.services] == [
        ("web", f"{ECR}/shop")
    ]
    assert tagged(manifest) == SHAPES[shape].format(image=f"{ECR}/shop:1a2b3c")


def test_a_service_can_get_its_image_through_a_merge_key(tmp_path: Path) -> None:
    text = f"x-base: &base\n  image: {IMAGE}\nservices:\n  web:\n    <<: *base\n  worker:\n    <<: [*base]\n    command: work\n"
    manifest = read(tmp_path, text)
    assert [service.name for service in manifest.services] == ["web", "worker"]
    assert tagged(manifest) == text.replace("TAG", "1a2b3c")


def test_a_services_own_keys_override_merged_ones(tmp_path: Path) -> None:
    text = f"x-base: &base {{image: {ECR}/base:TAG, build: {{target: base}}}}\n"
    manifest = read(tmp_path, text + f"services:\n  own: {{<<: *base, image: {ECR}/own:TAG}}\n")
    assert [(s.repository, s.build.target) for s in manifest.services] == [(f"{ECR}/own", "base")]


def test_an_image_shared_by_alias_is_edited_once(tmp_path: Path) -> None:
    text = f"services:\n  web:\n    image: &image {IMAGE}\n  worker:\n    image: *image\n"
    manifest = read(tmp_path, text)
    assert len({service.tag_offset for service in manifest.services}) == 1
    assert tagged(manifest) == text.replace("TAG", "1a2b3c")


def test_third_party_images_stay_unchanged(tmp_path: Path) -> None:
    text = f"web:\n  image: {IMAGE}\nredis:\n  image: redis\ndb:\n  image: 'postgres:16'\nold:\n  image: {ECR}/x:TAGGED\n"
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
    "build: {context: ., args: {A: 1, B: 'two words', C: }}": Build(
        args=("A=1", "B=two words", "C")
    ),
    "build: {context: ., args: [A=1, B]}": Build(args=("A=1", "B")),
    "build: {context: ., args: {YES: yes, VERSION: 1.10, OCTAL: 010, DAY: 2026-11-24}}": Build(
        args=("YES=yes", "VERSION=1.10", "OCTAL=010", "DAY=2026-11-24")
    ),
    "build: .\n    dockerfile: D.prod": Build(".", "D.prod"),
    "build: https://example.com/app.git#main": Build("https://example.com/app.git#main"),
}


@pytest.mark.parametrize("written", BUILDS)
def test_build_settings_are_read_as_written(tmp_path: Path, written: str) -> None:
    [service] = read(tmp_path, f"services:\n  web:\n    image: {IMAGE}\n    {written}\n").services
    assert service.build == BUILDS[written]


@pytest.mark.parametrize(
    "text", ["a: \x00", "services: &s\n  - *s", "services: &s\n  <<: *s\n  web: *s", "? [a]\n: b"]
)
def test_unusual_yaml_gets_an_error_message(tmp_path: Path, text: str) -> None:
    assert problem_of(tmp_path, text).startswith("MANIFEST: ")


def test_the_build_settings_of_convox_yml_have_other_names(tmp_path: Path) -> None:
    text = f"services: {{web: {{image: '{IMAGE}', build: {{path: app, manifest: D.prod}}}}}}"
    [service] = read(tmp_path, text, "convox.yml").services
    assert service.build == Build("app", "D.prod")


@pytest.mark.parametrize("tag", ["tagged", "tag-1.2", "TAG-1", "stag", "TAGS"])
def test_an_image_with_a_similar_tag_is_third_party(tmp_path: Path, tag: str) -> None:
    text = f"web:\n  image: {IMAGE}\ndb:\n  image: r.io/db:{tag}\n"
    assert [service.name for service in read(tmp_path, text).services] == ["web"]


def test_an_init_container_is_uploaded_as_written(tmp_path: Path) -> None:
    init = "{image: 'r.io/init:TAG', command: migrate}"
    text = f"services:\n  web:\n    image: {IMAGE}\n    initContainer: {init}\n"
    manifest = read(tmp_path, text, "convox.yml")
    assert tagged(manifest) == text.replace(IMAGE, f"{ECR}/shop:1a2b3c")


def test_custom_yaml_tags_are_accepted(tmp_path: Path) -> None:
    text = (
        f"services:\n  web:\n    image: {IMAGE}\n    ports: !reset []\n    volumes: !override [x]\n"
    )
    assert tagged(read(tmp_path, text)) == text.replace("TAG", "1a2b3c")


def test_in_a_compose_file_each_service_needs_an_image_and_the_line_is_shown(
    tmp_path: Path,
) -> None:
    """convox.yml has `build: .` as the default."""
    services = f"web:\n    image: {IMAGE}\n  worker:\n    command: work\n  clock:\n"
    problem = problem_of(tmp_path, f"services:\n  {services}  api:\n    build: api\n")
    line = "image: <account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
    assert problem.splitlines() == [
        f"  - MANIFEST: service {name}: a Compose file needs an image here. Add this line: {line}"
        for name in ("worker", "clock", "api")
    ]


@pytest.mark.parametrize("image", ["r.io/shop", "r.io/shop:1", "r.io/shop:TAGGED", "shop"])
def test_in_a_compose_file_what_is_built_needs_the_tag(tmp_path: Path, image: str) -> None:
    problem = problem_of(tmp_path, f"web:\n  build: .\n  image: {image}\n")
    fix = "Change its tag to TAG, or remove `build:`."
    assert problem == f"MANIFEST: service web: {image} is not built. {fix}"


@pytest.mark.parametrize("tag", ["tag", "$TAG", "${TAG}", "${TAG:-latest}", "Tag"])
def test_a_tag_that_is_tag_in_another_spelling_is_an_error_with_the_line(
    tmp_path: Path, tag: str
) -> None:
    problem = problem_of(tmp_path, f"web:\n  image: r.io/shop:{tag}\n")
    fix = "only a literal :TAG is replaced. Set image: r.io/shop:TAG"
    assert problem == f"MANIFEST: service web: {fix}"


def test_a_character_outside_unicode_is_an_error(tmp_path: Path) -> None:
    assert problem_of(tmp_path, 'services: "\\UFFFFFFFF"').startswith("MANIFEST: ")


@pytest.mark.parametrize("build", ["{network: ''}", "{context: [x]}", "[x]"])
def test_a_build_key_that_is_not_supported_is_not_ignored(tmp_path: Path, build: str) -> None:
    text = f"web:\n  image: {IMAGE}\n  build: {build}\n"
    assert "service web: " in problem_of(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *(
            ("docker-compose.yml", args)
            for args in ("{A: {B: c}}", "{A: [b]}", "[{A: b}]", "[[A]]")
        ),
        *(("convox.yml", args) for args in ("[{A: b}]", "[[A]]")),
    ],
)
def test_nested_build_arguments_are_an_error(tmp_path: Path, args: str, name: str) -> None:
    text = f"services: {{web: {{image: '{IMAGE}', build: {{args: {args}}}}}}}\n"
    assert "service web: `build:` contains " in problem_of(tmp_path, text, name)


def test_a_build_without_keys_has_the_defaults(tmp_path: Path) -> None:
    text = f"web:\n  image: {IMAGE}\n  build: {{}}\n"
    assert read(tmp_path, text).services[0].build == Build()


def test_a_comment_within_the_image_is_not_the_tag(tmp_path: Path) -> None:
    text = "web:\n  image: &i # was :TAG\n    r.io/shop:TAG\n"
    assert tagged(read(tmp_path, text)) == text.replace("shop:TAG", "shop:1a2b3c")


def test_an_equals_sign_is_a_value_and_a_tilde_is_a_name(tmp_path: Path) -> None:
    text = f"services:\n  ~: {{image: {IMAGE}, environment: {{A: =}}}}\n"
    assert [service.name for service in read(tmp_path, text).services] == ["None"]


def test_extensions_at_the_top_of_compose_v1_are_no_services(tmp_path: Path) -> None:
    text = f"x-base: &base\n  image: {IMAGE}\n  build: .\nx-other: [1]\nweb:\n  <<: *base\n"
    assert [service.name for service in read(tmp_path, text).services] == ["web"]


@pytest.mark.parametrize("name", ["docker-compose.yml", "convox.yml"])
@pytest.mark.parametrize("platform", ["linux/arm64", "linux/amd64"])
def test_the_platform_of_a_service_is_part_of_its_build(
    tmp_path: Path, platform: str, name: str
) -> None:
    text = f"services:\n  web:\n    image: {IMAGE}\n    platform: {platform}\n"
    [service] = read(tmp_path, text, name).services
    assert service.build == Build(platform=platform)


@pytest.mark.parametrize("key", ["cache_from: [x]", "cache_to: [x]", "tags: [x]", "labels: {a: b}"])
def test_a_key_that_does_not_change_the_image_is_ignored(tmp_path: Path, key: str) -> None:
    text = f"services:\n  web:\n    image: {IMAGE}\n    build: {{context: app, {key}}}\n"
    assert read(tmp_path, text).services[0].build == Build("app")


@pytest.mark.parametrize("image", ["", f"image: '{IMAGE}', "])
@pytest.mark.parametrize("key", ["cache_from", "tags", "context", "dockerfile", "target", "x"])
def test_in_convox_yml_a_key_that_convox_does_not_read_is_an_error(
    tmp_path: Path, key: str, image: str
) -> None:
    text = f"services: {{web: {{{image}build: {{path: ., {key}: x}}}}}}\n"
    problem = problem_of(tmp_path, text, "convox.yml")
    fix = "Use path, manifest and args."
    assert problem == f"MANIFEST: service web: Convox ignores build.{key}. {fix}"


@pytest.mark.parametrize("key", ["network: host", "ssh: [default]", "secrets: [a]", "shm_size: 1g"])
def test_a_key_that_may_change_the_image_is_an_error(tmp_path: Path, key: str) -> None:
    text = f"services:\n  web:\n    image: {IMAGE}\n    build: {{context: app, {key}}}\n"
    assert f"build.{key.partition(':')[0]} is not supported." in problem_of(tmp_path, text)


def test_without_tag_each_service_is_named_with_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Dockerfile in the app's root says that something is to be built."""
    monkeypatch.chdir(tmp_path)
    Path("Dockerfile").touch()
    text = "services:\n  web:\n    image: shop:latest\n  db:\n    image: postgres:16\n"
    problem = problem_of(tmp_path, text)
    assert "web (shop:latest)" in problem and "db (postgres:16)" in problem


def test_a_manifest_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "docker-compose.yml")
    with pytest.raises(DeployError):  # reading it would hang
        Manifest.load(str(tmp_path / "docker-compose.yml"))


def test_only_at_the_top_level_is_x_no_service(tmp_path: Path) -> None:
    text = f"services: {{x-job: {{image: '{IMAGE}'}}}}\nx-other: {{image: '{IMAGE}'}}\n"
    assert [service.name for service in read(tmp_path, text).services] == ["x-job"]
