"""Properties of every manifest. Hypothesis looks for counterexamples."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import yaml
from conftest import ECR
from hypothesis import given, settings
from hypothesis import strategies as st

from convox_deploy import DeployError, Manifest

IMAGE = f"{ECR}/shop:TAG"
words = st.sampled_from(
    ["image", "build", "services", "TAG", IMAGE, "redis:7", "x:TAG", "<<", "args", "context", ""]
)
scalars = st.one_of(words, st.text(max_size=12), st.integers(), st.booleans(), st.none())
documents = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(words, st.text(max_size=5)), inner)
    ),
    max_leaves=25,
)
services = st.dictionaries(
    st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
    st.one_of(
        st.fixed_dictionaries(
            {"image": st.just(IMAGE)}, optional={"environment": documents, "command": scalars}
        ),
        st.fixed_dictionaries({"image": st.just("redis:7")}, optional={"labels": documents}),
    ),
    min_size=1,
    max_size=5,
)


NAMES = ["docker-compose.yml", "convox.yml"]
SETTINGS = settings(deadline=None, max_examples=50)  # others in each run


def read(data: bytes, name: str = "docker-compose.yml") -> Any:
    with tempfile.NamedTemporaryFile(suffix=name) as file:
        Path(file.name).write_bytes(data)
        return Manifest.load(file.name)


@SETTINGS
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode(errors="replace")),
    )
)
def test_arbitrary_bytes_cause_nothing_but_an_error_message(data: bytes) -> None:
    for name in NAMES:
        with contextlib.suppress(DeployError):
            read(data, name)


@SETTINGS
@given(documents, st.booleans())
def test_arbitrary_yaml_causes_nothing_but_an_error_message(document: Any, flow: bool) -> None:
    text = yaml.safe_dump(document, default_flow_style=flow, allow_unicode=True)
    for name in NAMES:
        with contextlib.suppress(DeployError):
            read(text.encode(errors="replace"), name)


@SETTINGS
@given(st.lists(st.sampled_from(["- ", "  ", "\n", "a: ", "&x ", "*x", "<<: ", "{", "}", "[", "]", IMAGE, "image: ", "|", ">", "'", '"', "\t", "\r\n", "services:\n", "? ", "#", "--- ", "!!str ", "%"]), max_size=30))  # fmt: skip
def test_arbitrary_yaml_fragments_cause_nothing_but_an_error_message(pieces: list[str]) -> None:
    for name in NAMES:
        with contextlib.suppress(DeployError):
            read("".join(pieces).encode(), name)


@SETTINGS
@given(services, st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_a_rewritten_manifest_differs_only_in_image_values(
    content: dict[str, Any], under_services: bool, flow: bool, line_ending: str
) -> None:
    ours = {name for name, service in content.items() if service["image"] == IMAGE}
    document = {"services": content} if under_services or "services" in content else content
    text = yaml.safe_dump(document, default_flow_style=flow, allow_unicode=True).replace(
        "\n", line_ending
    )
    try:
        manifest = read(text.encode())
    except DeployError as error:
        assert not ours, error
        return
    for service in manifest.services:
        service.tag = "abc-123"
    rewritten = manifest.with_tags()
    expected = {
        name: {**service, "image": f"{ECR}/shop:abc-123"} if name in ours else service
        for name, service in yaml.safe_load(text).get("services", yaml.safe_load(text)).items()
    }
    loaded = yaml.safe_load(rewritten)
    assert loaded.get("services", loaded) == expected
    assert {service.name for service in manifest.services} == ours
    assert len(rewritten) == len(text) + len(ours) * (len("abc-123") - len("TAG"))
