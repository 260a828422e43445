"""Names, versions and generations; what can be no name; loading the files a version meant."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from jlorax.adapters.files import read_file
from jlorax.adapters.loader import Loader
from jlorax.adapters.pack import PackedAdapter
from jlorax.adapters.packed_file import digest_of
from jlorax.adapters.registry import AdapterRecord, Registry, check_id
from jlorax.errors import (
    AdapterChanged,
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    InvalidAdapterId,
)
from jlorax.layout import BankLayout
from jlorax.types import AdapterVersion
from tests.adapters import helpers


@pytest.fixture
def root(tmp_path: Path) -> Path:
    helpers.write_good(tmp_path / "root" / "local", rank=4)
    helpers.write_good(tmp_path / "root" / "org" / "deep", rank=2)
    return tmp_path / "root"


def registry(root: Path | None) -> Registry:
    return Registry(root, "base", clock=lambda: 5.0)


BAD_IDS = [
    "",
    ".",
    "..",
    "...",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "C:/x",
    "a\\b",
    "file:///etc/passwd",
    "http://169.254.169.254/x",
    "s3://other-bucket/x",
    "..%2f..%2f",
    "a/../../b",
    "....//",
    "a//b",
    "a/",
    "a/./b",
    "nul\0",
    "new\nline",
    "tab\t",
    "rtl\u202e",
    "zero\u200bwidth",
    "lone\ud800",
    "wide\u3000blank",
    " a",
    "a ",
    "a/ b",
    "-rf",
    "a/-b",
    "x" * 256,
    "x" * 10_000,
]


@pytest.mark.parametrize("adapter_id", BAD_IDS)
@pytest.mark.parametrize("source", [None, "local"])
def test_what_can_be_no_name(adapter_id: str, source: str | None, root: Path) -> None:
    with pytest.raises(InvalidAdapterId) as caught:
        registry(root).resolve("default", adapter_id, source)
    str(caught.value).encode()  # can be sent
    assert len(str(caught.value)) < 250
    with pytest.raises(InvalidAdapterId):
        registry(root).register(adapter_id, root / "local")


@pytest.mark.parametrize(
    "adapter_id", ["a", "a--b/c", "org/name", "v1.5", "Größe", "a b", "x" * 255]
)
def test_names(adapter_id: str) -> None:
    check_id(adapter_id)


def test_dashes_do_not_confuse_two_folders(root: Path) -> None:
    helpers.write_good(root / "a--b" / "c", rank=1)
    helpers.write_good(root / "a" / "b--c", rank=2)
    names = registry(root)
    one, two = names.resolve("default", "a--b/c"), names.resolve("default", "a/b--c")
    assert one != two
    assert [names.record(v).rank for v in (one, two)] == [1, 2]


def test_registered_first_then_the_folder(root: Path, tmp_path: Path) -> None:
    names = registry(root)
    names.register("local", helpers.write_good(tmp_path / "other", rank=3))
    registered, local = (
        names.resolve("default", "local"),
        names.resolve("default", "local", "local"),
    )
    assert registered != local
    assert names.record(registered).rank == 3 and names.record(local).rank == 4
    assert names.resolve("default", "local") == registered  # switching makes no new version
    assert names.resolve("default", "local", "local") == local
    with pytest.raises(AdapterNotFound):
        names.register("only", tmp_path / "other")
        names.resolve("default", "only", "local")


def test_generations(root: Path) -> None:
    names = registry(root)
    first = names.resolve("default", "local")
    assert names.resolve("default", "local") == first == AdapterVersion("default", "local", 1)
    helpers.write_good(root / "local", rank=8)
    second = names.resolve("default", "local")
    assert second.generation == 2 and names.record(second).rank == 8
    assert names.record(first).rank == 4  # running requests still find theirs
    os.utime(root / "local" / "adapter_model.safetensors", ns=(0, 0))
    assert names.resolve("default", "local").generation == 3


def test_registered_anew_is_a_new_version(root: Path) -> None:
    names = registry(None)
    first = names.register("x", root / "local")
    with pytest.raises(AdapterConflict, match="'x' is registered already"):
        names.register("x", root / "local")
    assert names.unregister("x") == first
    with pytest.raises(AdapterNotFound):
        names.resolve("default", "x")
    with pytest.raises(AdapterNotFound):
        names.unregister("x")
    assert names.register("x", root / "local").generation == 2


@pytest.mark.parametrize("adapter_id", ["base", "__base_model__"])
def test_the_base_models_names(adapter_id: str, root: Path) -> None:
    helpers.write_good(root / adapter_id)
    names = registry(root)
    with pytest.raises(AdapterConflict, match="base model's name"):
        names.register(adapter_id, root / "local")
    with pytest.raises(AdapterNotFound):
        names.resolve("default", adapter_id)
    assert adapter_id not in {r.version.adapter_id for r in names.records()}


def test_tenants(root: Path) -> None:
    names = registry(root)
    names.register("mine", root / "local", tenant="t1")
    names.register("ours", root / "local")
    assert names.resolve("t1", "mine").tenant == "t1"
    assert names.resolve("t2", "ours") == names.resolve("t1", "ours")
    with pytest.raises(AdapterNotFound) as other:
        names.resolve("t2", "mine")
    with pytest.raises(AdapterNotFound) as unknown:
        names.resolve("t2", "none")
    assert str(other.value).replace("mine", "none") == str(unknown.value)


def test_unknown_and_broken(root: Path) -> None:
    names = registry(root)
    with pytest.raises(AdapterNotFound):
        names.resolve("default", "none")
    with pytest.raises(AdapterNotFound):
        registry(None).resolve("default", "local")
    (root / "empty").mkdir()
    with pytest.raises(AdapterInvalid, match="is missing"):
        names.resolve("default", "empty")
    with pytest.raises(AdapterInvalid):
        names.register("empty", root / "empty")
    with pytest.raises(AdapterNotFound):
        names.resolve("default", "local/adapter_config.json")
    names.register("empty", root / "local")  # the failure left nothing behind


def test_links_out_of_the_root(root: Path, tmp_path: Path) -> None:
    helpers.write_good(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "slash").symlink_to("/")
    (root / "loop").symlink_to(root / "loop")
    (root / "alias").symlink_to(root / "local")
    names = registry(root)
    for adapter_id in ("link", "slash", "loop", "slash/etc"):
        with pytest.raises(AdapterNotFound):
            names.resolve("default", adapter_id)
    assert names.record(names.resolve("default", "alias")).rank == 4
    found = {record.version.adapter_id for record in names.records()}
    assert found == {"local", "org/deep", "alias"}


def test_folder_that_the_api_names(root: Path, tmp_path: Path) -> None:
    helpers.write_good(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    names = registry(root)
    assert names.folder_under_root("org/deep") == root / "org" / "deep"
    for path in ("none", "link"):
        with pytest.raises(AdapterNotFound):
            names.folder_under_root(path)
    with pytest.raises(InvalidAdapterId):
        names.folder_under_root("../outside")


def test_list_and_counts(root: Path) -> None:
    helpers.write_good(root / "broken")
    (root / "broken" / "adapter_config.json").write_text("{")
    helpers.write_good(root / "-odd")
    names = registry(root)
    names.register("x", root / "local")
    names.resolve("default", "x")
    names.resolve("default", "x")
    records = {(r.source, r.version.adapter_id): r for r in names.records()}
    assert set(records) == {("registered", "x"), ("local", "local"), ("local", "org/deep")}
    x = records["registered", "x"]
    assert (x.num_requests, x.last_used_s, x.rank) == (2, 5.0, 4)
    assert x.target_modules == ("q_proj", "v_proj")
    assert records["local", "local"].num_requests == 0


def load(record: AdapterRecord, layout: BankLayout) -> PackedAdapter:
    return Loader(layout).load(record).packed


def test_load(root: Path) -> None:
    names, layout = registry(root), helpers.layout()
    record = names.record(names.resolve("default", "local"))
    packed = load(record, layout)
    assert packed.ranks == {"q_proj": 4, "v_proj": 4}
    digest, key = digest_of(packed, layout), Loader(layout).key(record)
    assert digest_of(load(record, layout), layout) == digest
    assert Loader(helpers.layout("bfloat16")).key(record) != key
    helpers.write_good(root / "local", seed=1)
    again = names.record(names.resolve("default", "local"))
    assert digest_of(load(again, layout), layout) != digest
    assert Loader(layout).key(again) != key


def test_changed_before_or_while_loading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, layout = registry(root), helpers.layout()
    record = names.record(names.resolve("default", "local"))
    helpers.write_good(root / "local", seed=1)
    with pytest.raises(AdapterChanged):
        load(record, layout)

    record = names.record(names.resolve("default", "local"))

    def replace_behind(folder: Path, name: str, *rest: object) -> object:
        result = read_file(folder, name, *rest)  # type: ignore[arg-type]
        helpers.write_good(root / "other", seed=2)
        os.replace(root / "other" / name, folder / name)
        return result

    monkeypatch.setattr("jlorax.adapters.sources.read_file", replace_behind)
    with pytest.raises(AdapterChanged):
        load(record, layout)


def test_a_name_is_replaced_and_put_back(root: Path) -> None:
    names = registry(root)
    first = names.register("x", root / "local")
    second, old = names.replace("x", root / "org" / "deep")
    assert (second.generation, old) == (2, root / "local")
    assert names.resolve("default", "x") == second and not names.is_current(first)
    names.restore(second, old)
    third = names.resolve("default", "x")
    assert names.record(third).rank == 4 and third.generation == 3
    with pytest.raises(AdapterInvalid):
        names.replace("x", root / "org")  # the failure left it as it was
    assert names.resolve("default", "x") == third
    assert names.replace("y", root / "local")[1] is None


def test_a_survey_is_merged_with_what_happened_meanwhile(root: Path) -> None:
    names = registry(root)
    kept, gone = names.register("kept", root / "local"), names.register("gone", root / "local")
    changed = names.register("changed", root / "local")
    look = names.survey()
    names.unregister("gone")
    names.replace("changed", root / "org" / "deep")
    helpers.write_good(root / "new", rank=3)
    helpers.write_good(root / "local", seed=5)
    found = {(r.source, r.version.adapter_id): r for r in names.merge(look())}
    assert found["registered", "kept"].version.generation == kept.generation + 1
    assert ("registered", "gone") not in found and ("local", "new") in found
    assert names.resolve("default", "changed").generation == changed.generation + 1
    assert gone not in {record.version for record in names.records()}


def test_ten_thousand_names_cost_little(tmp_path: Path) -> None:
    """At most 2 KB each: no weights are read."""
    num, root = 300, tmp_path / "root"
    first = helpers.write_good(root / "0000", rank=4)
    for i in range(1, num):
        folder = root / f"{i:04d}"
        folder.mkdir()
        os.link(first / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(helpers.config(lora_alpha=i)))
    names = registry(root)
    tracemalloc.start()
    try:
        records = names.records()
        assert len(records) == num
        del records
        assert tracemalloc.get_traced_memory()[0] < 2048 * num
    finally:
        tracemalloc.stop()
