"""``shardbook.read`` of whatever real writers left: by ref, by directory, by URL, with no torch in the process."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

import shardbook
from shardbook import dcp
from shardbook.config import ClientConfig
from shardbook.core import directory as names
from shardbook.errors import (
    CorruptDataError,
    CorruptManifestError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from shardbook.reading.filling import SMALL_BYTES
from tests.torch import jobs
from tests.torch.harness import RankPool
from tests.torch.layouts import truth
from tests.torch.reading.written import DTYPES, NOT_IN_SAFETENSORS, noise, same_bits
from tests.unit.test_pickled_metadata import Canary

#: What is read of files has nothing to do with the kind of database.
pytestmark = [
    pytest.mark.soak_with("postgres"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning"),
    # torch says it once a process, with the first complex32 tensor that it makes.
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

ROOT = Path(__file__).resolve().parents[3]


def wrong_tensors(target: str | Path, metadata: Metadata, **options: Any) -> list[str]:
    """Returns the names of a layout's tensors that do not read as what they are, whole or in part."""
    shapes = {
        fqn: (tuple(entry.size), entry.properties.dtype)
        for fqn, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert shapes
    whole = shardbook.read_many(target, list(shapes), **options)
    part = shardbook.read_many(
        target, {fqn: (slice(1, -1), ...) if shape else None for fqn, (shape, _) in shapes.items()}, **options
    )
    assert list(shapes) == list(whole)
    wrong = []
    for fqn, (shape, dtype) in shapes.items():
        right = truth(f".{fqn}", shape, dtype)
        if not same_bits(right, whole[fqn]) or not same_bits(right[1:-1] if shape else right, part[fqn]):
            wrong.append(fqn)
    return wrong


@pytest.mark.parametrize(
    "layout", ["fsdp", "hsdp", "tensor_parallel", "pipeline", "uneven", "sharded_tensor", "objects"]
)
def test_what_ranks_saved(pool: RankPool, server: str, run: str, tmp_path: Path, layout: str) -> None:
    """Every sharding, by ref, by directory, and by the directory's ``.metadata`` alone."""
    path = tmp_path / "step-1"
    (saved, *_) = pool.run(jobs.save, layout, [str(path)], {"run": run, "server": server}, {}, world_size=4)
    metadata = FileSystemReader(path).read_metadata()
    assert [] == wrong_tensors(saved.results[0].ref, metadata, config=ClientConfig(server=server))
    assert [] == wrong_tensors(path, metadata)
    shutil.rmtree(path / names.ROOT)
    assert [] == wrong_tensors(path, metadata)


@pytest.mark.parametrize("is_safetensors", [False, True], ids=["torch.save", "safetensors"])
@pytest.mark.parametrize("layout", ["fsdp", "tensor_parallel", "uneven"])
def test_what_ranks_saved_with_plain_dcp(pool: RankPool, tmp_path: Path, layout: str, is_safetensors: bool) -> None:
    """In both formats of its writer; torch itself has no reader for one of them."""
    path = tmp_path / "step-1"
    pool.run(jobs.save_by_dcp, layout, str(path), is_safetensors, world_size=4)
    assert [] == wrong_tensors(path, FileSystemReader(path).read_metadata())


def test_what_ranks_saved_with_the_hugging_face_writer(pool: RankPool, tmp_path: Path) -> None:
    """The headers of its files are all the metadata there is."""
    path = tmp_path / "step-1"
    pool.run(jobs.save_by_hugging_face, "uneven", str(path), world_size=4)
    assert [] == wrong_tensors(path, HuggingFaceStorageReader(str(path)).read_metadata())


def every_dtype() -> dict[str, Any]:
    """Tensors of every dtype and some shapes, and memory that is not row-major."""
    state = {f"{str(dtype)[6:]}{shape}": noise(shape, dtype) for dtype in DTYPES for shape in [(), (0, 3), (5, 7)]}
    return {**state, "t": noise((30, 20), torch.float32).t(), "conj": noise((4,), torch.complex64).conj()}


@pytest.mark.parametrize("writer", ["shardbook", "dcp", "safetensors", "hugging face"])
def test_every_dtype(run: str, tmp_path: Path, writer: str) -> None:
    """Bit for bit what was saved, by every writer."""
    state, path = every_dtype(), tmp_path / "step-1"
    if writer in ("safetensors", "hugging face"):
        state = {name: one for name, one in state.items() if one.dtype not in NOT_IN_SAFETENSORS and name[0] != "t"}
        state.pop("conj")
    if writer == "shardbook":
        dcp.init(run=run, mode="offline")
        dcp.save(state, checkpoint_id=path)
        dcp.close()
    elif writer == "hugging face":
        torch_save(state, storage_writer=HuggingFaceStorageWriter(str(path)))
    else:
        form = SerializationFormat.TORCH_SAVE if writer == "dcp" else SerializationFormat.SAFETENSORS
        torch_save(state, storage_writer=FileSystemWriter(path, serialization_format=form))
    found = shardbook.read_many(path, list(state))
    assert [] == [name for name, tensor in state.items() if not same_bits(tensor, found[name])]


BIG = SMALL_BYTES // 4 + 1000


@pytest.fixture
def directory(run: str, tmp_path: Path) -> Path:
    """A checkpoint directory by an offline save."""
    dcp.init(run=run, mode="offline")
    dcp.save(
        {"w": torch.arange(float(BIG)), "m": noise((9, 4), torch.bfloat16), "o": {"lr": 0.5}},
        checkpoint_id=tmp_path / "step-1",
    )
    dcp.close()
    return tmp_path / "step-1"


class TestDirectories:
    """What is read of a directory, and what is said of one that cannot be read."""

    def test_as_text_path_and_relative(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever names it."""
        monkeypatch.chdir(directory.parent)
        for target in (directory, str(directory), f"{directory}/", f"file://{directory}", "step-1", "./step-1"):
            assert 3.0 == shardbook.read(target, "w", 3)

    def test_records_that_nobody_folded(self, pool: RankPool, run: str, tmp_path: Path) -> None:
        """The coordinator was killed before it had made the manifest."""
        path = tmp_path / "step-1"
        pool.run(jobs.save_unfolded, "fsdp", str(path), {"run": run, "mode": "offline"}, world_size=2)
        assert not (path / names.MANIFEST).exists()
        found = shardbook.read(path, "model.0.weight")
        assert same_bits(truth(".model.0.weight", (10, 6), torch.float32), found)

    @pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")
    def test_a_younger_save_by_plain_dcp_counts(self, directory: Path) -> None:
        """As for ``load``."""
        time.sleep(0.01)
        torch_save({"w": torch.zeros(3)}, storage_writer=FileSystemWriter(directory, overwrite=True))
        assert [0.0] * 3 == shardbook.read(directory, "w").tolist()

    def test_an_object_is_named(self, directory: Path) -> None:
        """What it is, and what loads it."""
        with pytest.raises(InvalidArgumentError, match=r"bytes entry.*shardbook\.dcp\.load") as caught:
            shardbook.read(directory, "o.lr")
        assert "NOT_A_TENSOR" == caught.value.reason

    def test_a_name_that_is_not_there(self, directory: Path) -> None:
        """Also one that others begin with."""
        for fqn in ("x", "", "mm"):
            with pytest.raises(NotFoundError) as caught:
                shardbook.read(directory, fqn)
            assert "NO_SUCH_TENSOR" == caught.value.reason

    def test_nothing_there(self, tmp_path: Path) -> None:
        """An empty directory, and none."""
        for target in (tmp_path, tmp_path / "none"):
            with pytest.raises(NotFoundError):
                shardbook.read(target, "w")

    def test_a_damaged_manifest(self, directory: Path) -> None:
        """A typed error, and nothing in it runs."""
        for path in directory.rglob("manifest"):
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CorruptManifestError):
            shardbook.read(directory, "w")

    def test_a_truncated_data_file(self, directory: Path) -> None:
        """Named with its place."""
        (data,) = directory.rglob("*.distcp")
        data.write_bytes(data.read_bytes()[:1000])
        with pytest.raises(CorruptDataError, match="ends before") as caught:
            shardbook.read(directory, "w")
        assert caught.value.metadata["file"].endswith(data.name)

    def test_a_sparse_tensor(self, tmp_path: Path) -> None:
        """Its layout is in the metadata, so no byte of it is read."""
        torch_save({"s": torch.zeros(3)}, checkpoint_id=tmp_path / "1")
        metadata = FileSystemReader(tmp_path / "1").read_metadata()
        entry = metadata.state_dict_metadata["s"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.properties.layout = torch.sparse_coo
        (tmp_path / "1" / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(InvalidArgumentError, match="sparse_coo") as caught:
            shardbook.read(tmp_path / "1", "s")
        assert "UNSUPPORTED_LAYOUT" == caught.value.reason

    def test_a_canary_in_a_plain_directory_is_never_run(self, tmp_path: Path) -> None:
        """``.metadata`` is read with stand-ins."""
        torch_save({"w": torch.zeros(3)}, checkpoint_id=tmp_path / "1")
        bad = FileSystemReader(tmp_path / "1").read_metadata()
        bad.planner_data = {"x": Canary(tmp_path / "ran")}
        (tmp_path / "1" / ".metadata").write_bytes(pickle.dumps(bad))
        with pytest.raises(FailedPreconditionError) as caught:
            shardbook.read(tmp_path / "1", "w")
        assert "UNSAFE_METADATA" == caught.value.reason
        assert not (tmp_path / "ran").exists()

    def test_bfloat16_without_ml_dtypes(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The extra is named; what numpy has itself is read."""
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(InvalidArgumentError, match=r"shardbook\[read\]") as caught:
            shardbook.read(directory, "m")
        assert "MISSING_PACKAGE" == caught.value.reason
        assert 3.0 == shardbook.read(directory, "w", 3)


class TestRefs:
    """Checkpoints of the catalogue."""

    def test_names_that_begin_alike_and_hold_anything(self, session: dcp.Session, server: str, tmp_path: Path) -> None:
        """One call, whatever the names have in common."""
        state = {name: torch.tensor(float(at)) for at, name in enumerate(["a", "a.b", "a\0ü", "aü", "b[0]"])}
        result = dcp.save(state, checkpoint_id=tmp_path / "1")
        for wanted in (["a"], ["aü", "a\0ü"], list(state)):
            found = shardbook.read_many(str(result.ref), wanted, config=ClientConfig(server=server))
            assert {name: state[name].item() for name in wanted} == {
                name: array.item() for name, array in found.items()
            }

    def test_a_store_is_found_here(self, session: dcp.Session, server: str, tmp_path: Path) -> None:
        """As the client's configuration says; a directory that is not there is said to be."""
        result = dcp.save({"w": torch.arange(3.0)}, checkpoint_id=tmp_path / "1")
        (tmp_path / "1").rename(tmp_path / "elsewhere")
        with pytest.raises(NotFoundError) as caught:
            shardbook.read(str(result.ref), "w", config=ClientConfig(server=server))
        assert "NO_DATA_FILE" == caught.value.reason

    def test_what_is_not_there(self, session: dcp.Session, server: str, tmp_path: Path) -> None:
        """A checkpoint, and a tensor."""
        result = dcp.save({"w": torch.arange(3.0)}, checkpoint_id=tmp_path / "1")
        for ref, fqn in ((f"{session.run}@77", "w"), (str(result.ref), "ww")):
            with pytest.raises(NotFoundError):
                shardbook.read(ref, fqn, config=ClientConfig(server=server))

    def test_a_server_that_is_away(self, run: str) -> None:
        """Said, with the way around it."""
        with pytest.raises(UnavailableError, match="without a server"):
            shardbook.read(f"{run}@1", "w", config=ClientConfig(server="127.0.0.1:1", timeout_s=0.5))


class TestUrls:
    """Object stores, by range."""

    @pytest.fixture(params=["memory", "s3"])
    def url(self, request: pytest.FixtureRequest, directory: Path) -> str:
        """The URL of a copy of a checkpoint directory."""
        root = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
        url = f"{root}/{directory.parent.name}/step-1"
        filesystem, path = fsspec.core.url_to_fs(url)
        for file in directory.rglob("*"):
            if file.is_file():
                filesystem.pipe_file(f"{path}/{file.relative_to(directory).as_posix()}", file.read_bytes())
        return url

    def test_the_same_as_from_the_directory(self, url: str, directory: Path) -> None:
        """A whole tensor, and rows of one by range alone."""
        for fqn, region in (("w", None), ("w", slice(5, 9)), ("m", (slice(2, 4), 1))):
            expected, found = shardbook.read(directory, fqn, region), shardbook.read(url, fqn, region)
            assert (expected.dtype, expected.tobytes()) == (found.dtype, found.tobytes())

    def test_a_plain_dcp_directory(self, url: str) -> None:
        """Its ``.metadata`` is read from there, too."""
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.rm(f"{path}/{names.ROOT}", recursive=True)
        assert np.array_equal(np.arange(5.0, 9.0), shardbook.read(url, "w", slice(5, 9)))

    def test_a_file_that_is_gone_or_ends_early(self, url: str) -> None:
        """Typed errors, in the words of no store."""
        filesystem, path = fsspec.core.url_to_fs(url)
        (data,) = (name for name in filesystem.find(path) if name.endswith(".distcp"))
        filesystem.pipe_file(data, filesystem.cat_file(data)[:100])
        filesystem.invalidate_cache()
        with pytest.raises(CorruptDataError, match="ends before"):
            shardbook.read(url, "w", slice(-5, None))
        filesystem.rm_file(data)
        with pytest.raises(NotFoundError) as caught:
            shardbook.read(url, "w")
        assert "NO_DATA_FILE" == caught.value.reason

    def test_a_scheme_that_nobody_knows(self) -> None:
        """The package is asked for."""
        with pytest.raises(InvalidArgumentError) as caught:
            shardbook.read("nosuch://bucket/step-1", "w")
        assert "MISSING_PACKAGE" == caught.value.reason


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # whoever imports it fails
import shardbook
whole = shardbook.read_many(sys.argv[1], ["w", "m"])
print(whole["m"].dtype, whole["w"].shape, shardbook.read(sys.argv[1], "w", slice(3, 5)).tolist())
unwanted = {"typer", "rich", "sqlalchemy", "safetensors", "shardbook_server"}
print(sorted({name.partition(".")[0] for name in sys.modules} & unwanted))
"""


@pytest.mark.parametrize("is_plain", [False, True], ids=["manifest", "plain DCP"])
def test_a_process_without_torch(directory: Path, is_plain: bool) -> None:
    """A fresh interpreter in which torch cannot be imported, from a manifest and from DCP's ``.metadata``."""
    if is_plain:
        shutil.rmtree(directory / names.ROOT)
    command = [sys.executable, "-W", "error", "-c", _WITHOUT_TORCH, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ("", f"bfloat16 ({BIG},) [3.0, 4.0]\n[]\n") == (done.stderr, done.stdout)
