"""Hostile and damaged ONNX files: the gate raises FormatError, or lets a well-formed one pass, and that soon."""

import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pitstop.bundle.formats import read_onnx_adapter, read_onnx_graph
from pitstop.bundle.formats.onnx_adapter import MAX_NOTE, note
from pitstop.bundle.formats.onnx_graph import FILES_KEY, MAX_DEPTH, MAX_FIELDS, is_plain_name
from pitstop.errors import FormatError

SECONDS = 5.0  # generous, for a busy machine: every case here takes far less than one
SHA256 = "5" * 64
PARAMETERS = {
    "lora.0.attn.q_proj.A": np.arange(8, dtype=np.float32).reshape(4, 2),
    "lora.0.attn.q_proj.B": np.arange(6, dtype=np.float32).reshape(2, 3),
    "lora.1.mlp.down_proj.A": np.zeros((4, 0), np.float32),
    "lora.1.mlp.down_proj.B": np.zeros((0, 3), np.float32),
}

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(data: bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(data)
        return path

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


def adapter_bytes(folder: Path, parameters: Mapping[str, np.ndarray]) -> bytes:
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(7)
    made.set_model_version(1)
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()})
    made.export_adapter(str(folder / "made"))
    return (folder / "made").read_bytes()


@pytest.fixture(scope="module")
def adapter(folder: Path) -> bytes:
    """What ONNX Runtime writes."""
    return adapter_bytes(folder, PARAMETERS)


def test_it_reads_what_onnx_runtime_writes(adapter: bytes, write: Write) -> None:
    header = read_onnx_adapter(write(adapter))
    assert (header.adapter_version, header.model_version, header.file_size) == (7, 1, len(adapter))
    assert (header.base_sha256, header.invocation) == (None, ())
    assert {tensor.name: tensor.shape for tensor in header.tensors} == {n: v.shape for n, v in PARAMETERS.items()}
    for tensor in header.tensors:
        assert tensor.type == "F32"
        assert adapter[tensor.offset : tensor.offset + tensor.size] == PARAMETERS[tensor.name].tobytes()


def test_half_floats_are_read(folder: Path, write: Write) -> None:
    half = {name: value.astype(np.float16) for name, value in PARAMETERS.items()}
    assert {tensor.type for tensor in read_onnx_adapter(write(adapter_bytes(folder, half))).tensors} == {"F16"}


def test_the_note_says_which_base_it_is_for_and_onnx_runtime_does_not_mind(adapter: bytes, write: Write) -> None:
    path = write(adapter + note(SHA256, (1, 2)))
    header = read_onnx_adapter(path)
    assert (header.base_sha256, header.invocation) == (SHA256, (1, 2))
    assert len(header.tensors) == len(PARAMETERS)
    onnxruntime.LoraAdapter().Load(str(path))
    assert len(onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()) == len(PARAMETERS)


def noted(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return raw + struct.pack("<I", len(raw)) + b"pitstop1"


@pytest.mark.parametrize(
    "end",
    [
        noted("{"),
        noted(b"\xff"),
        noted("[]"),
        noted('{"base_sha256": 5}'),
        noted("{}"),
        noted(json.dumps({"base_sha256": SHA256, "invocation": 5})),
        noted(json.dumps({"base_sha256": SHA256, "invocation": [True]})),
        noted(json.dumps({"base_sha256": SHA256, "invocation": [-1]})),
        noted(json.dumps({"base_sha256": SHA256, "invocation": [1] * 65})),
        noted("[" * 50_000),
        noted(" " * (MAX_NOTE + 1)),
        struct.pack("<I", 1 << 31) + b"pitstop1",
    ],
)
def test_a_malformed_note_is_refused(adapter: bytes, write: Write, end: bytes) -> None:
    with pytest.raises(FormatError, match=r"note|invocation"):
        read_onnx_adapter(write(adapter + end))


def refused(folder: Path) -> dict[str, bytes]:
    good = adapter_bytes(folder, PARAMETERS)
    name = good.index(b"lora.0.attn.q_proj.B")
    kind = good.index(struct.pack("<i", 1), 16)
    return {
        "empty": b"",
        "other identifier": good[:4] + b"ORTM" + good[8:],
        "root outside": struct.pack("<I", len(good) + 1) + good[4:],
        "root points to itself": bytes(4) + good[4:],
        "a type that no adapter has": adapter_bytes(folder, {"a": np.zeros((2, 2), np.int64)}),
        "a name twice": good[: name + 19] + b"A" + good[name + 20 :],
        "a name with NUL": good[:name] + b"\0" + good[name + 1 :],
        "a long name": adapter_bytes(folder, {"a" * 257: np.zeros((2, 2), np.float32)}),
        "five dimensions": adapter_bytes(folder, {"a": np.zeros((1, 1, 1, 1, 1), np.float32)}),
        "no parameters": adapter_bytes(folder, {}),
        "another format version": good[:kind] + struct.pack("<i", 2) + good[kind + 4 :],
    }


@pytest.mark.parametrize("case", range(11))
def test_a_malformed_adapter_is_refused(folder: Path, write: Write, case: int) -> None:
    name, data = list(refused(folder).items())[case]
    with pytest.raises(FormatError) as caught:
        read_onnx_adapter(write(data))
    assert caught.value.cure, name


def test_every_truncation_of_an_adapter_is_refused(adapter: bytes, write: Write) -> None:
    end = max(tensor.offset + tensor.size for tensor in read_onnx_adapter(write(adapter)).tensors)
    for length in range(end):
        with pytest.raises(FormatError):
            read_onnx_adapter(write(adapter[:length]))


def survives(read: Callable[[Path], object], path: Path) -> None:
    begun = time.process_time()
    try:
        read(path)
    except FormatError as error:
        assert str(path) in str(error)  # noqa: PT017 - it may as well be read
    assert time.process_time() - begun < SECONDS


ANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY
@given(data=st.binary(max_size=400), begin=st.sampled_from([b"", b"\x0c\0\0\0TORT"]))
def test_anything_at_all_is_read_or_refused_as_an_adapter(write: Write, data: bytes, begin: bytes) -> None:
    survives(read_onnx_adapter, write(begin + data))


@ANY
@given(data=st.data())
def test_a_changed_adapter_is_read_or_refused(adapter: bytes, write: Write, data: st.DataObject) -> None:
    changed = bytearray(adapter + note(SHA256))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 4))
        changed[at : at + 4] = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff\xff\xff\xff", bytes(4), b"\0\0\0\x80"])
            )
        )
    survives(read_onnx_adapter, write(bytes(changed)))


def graph(
    *, location: str = "weights", files: object = None, offset: str = "0", initializers: int = 1
) -> onnx.ModelProto:
    """A product with a matrix in another file, and the two inputs of an adapter."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", "48")):
        weight.external_data.add(key=key, value=value)
    a = helper.make_tensor("lora.0.attn.q_proj.A", TensorProto.FLOAT, [4, 0], [])
    b = helper.make_tensor("lora.0.attn.q_proj.B", TensorProto.FLOAT, [0, 3], [])
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 4]), (a.name, [4, "r"]), (b.name, ["r", 3]))
    ]
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weight] * initializers + [a, b],
    )
    model = helper.make_model(made)
    text = files if isinstance(files, str) else json.dumps(files or {"weights": SHA256, "tokenizer.json": SHA256})
    helper.set_model_props(model, {FILES_KEY: text})
    return model


def test_a_graph_is_read(write: Write) -> None:
    header = read_onnx_graph(write(graph().SerializeToString()))
    assert header.files == {"weights": SHA256, "tokenizer.json": SHA256}
    assert [(one.file, one.offset, one.length) for one in header.external] == [("weights", 0, 48)]
    assert {name: (one.shape, one.default) for name, one in header.inputs.items()} == {
        "x": (("n", 4), None),
        "lora.0.attn.q_proj.A": ((4, "r"), (4, 0)),
        "lora.0.attn.q_proj.B": (("r", 3), (0, 3)),
    }


def test_data_of_a_constant_deep_inside_is_seen(write: Write) -> None:
    model = graph()
    inner = helper.make_graph([], "inner", [], [])
    inner.initializer.add().CopyFrom(model.graph.initializer[0])
    inner.initializer[0].external_data[0].value = "../../etc/passwd"
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    with pytest.raises(FormatError, match="no file beside the graph"):
        read_onnx_graph(write(model.SerializeToString()))
    sparse = graph()
    sparse.graph.sparse_initializer.add().values.CopyFrom(inner.initializer[0])
    with pytest.raises(FormatError, match="no file beside the graph"):
        read_onnx_graph(write(sparse.SerializeToString()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "/etc/passwd"}, "no file beside the graph"),
        ({"location": "../weights"}, "no file beside the graph"),
        ({"location": "a\\b"}, "no file beside the graph"),
        ({"location": ".."}, "no file beside the graph"),
        ({"location": "other"}, "not among the files"),
        ({"offset": "-1"}, "has its data at"),
        ({"offset": "1e3"}, "has its data at"),
        ({"offset": "9" * 19}, "has its data at"),
        ({"files": {"../x": SHA256}}, "no name of a file"),
        ({"files": {"x": 5}}, "no name of a file"),
        ({"files": [1]}, "must map"),
        ({"files": "["}, "is no JSON"),
        ({"files": {f"f{n}": SHA256 for n in range(65)}}, "must map"),
        ({"initializers": 2}, "twice"),
    ],
)
def test_a_graph_that_reaches_outside_or_means_nothing_is_refused(
    write: Write, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_onnx_graph(write(graph(**changes).SerializeToString()))  # type: ignore[arg-type]


def field(number: int, data: bytes) -> bytes:
    length, head = len(data), bytearray()
    for value in (number << 3 | 2, length):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head) + data


def test_graphs_that_protobuf_would_join_are_refused(write: Write) -> None:
    data = graph().SerializeToString()
    with pytest.raises(FormatError, match="2 graphs"):
        read_onnx_graph(write(data + field(7, b"")))
    with pytest.raises(FormatError, match="0 graphs"):
        read_onnx_graph(write(b""))


def test_a_graph_built_to_cost_time_is_refused_soon(write: Write) -> None:
    deep = b""
    for _ in range(MAX_DEPTH):
        deep = field(1, field(5, field(6, deep)))
    for data, message in (
        (field(7, deep), "deep"),
        (field(7, b"\x08\0" * (MAX_FIELDS + 1)), "fields"),
        (field(7, b"\x80" * 11), "ends nowhere"),
        (field(7, b"\x0b"), "wire type"),
        (field(7, b"\0\0"), "number 0"),
    ):
        begun = time.process_time()
        with pytest.raises(FormatError, match=message):
            read_onnx_graph(write(data))
        assert time.process_time() - begun < SECONDS


@ANY
@given(data=st.binary(max_size=300), inside=st.booleans())
def test_anything_at_all_is_read_or_refused_as_a_graph(write: Write, data: bytes, inside: bool) -> None:
    survives(read_onnx_graph, write(field(7, data) if inside else data))


@ANY
@given(data=st.data())
def test_a_changed_graph_is_read_or_refused(write: Write, data: st.DataObject) -> None:
    changed = bytearray(graph().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + 1] = data.draw(st.binary(max_size=3))
    path = write(bytes(changed))
    survives(read_onnx_graph, path)


@pytest.mark.parametrize("read", [read_onnx_adapter, read_onnx_graph])
def test_what_is_no_file_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(FormatError):
            read(path)


def test_plain_names() -> None:
    assert is_plain_name("model.onnx.data")
    assert not any(map(is_plain_name, ("", ".", "..", "a/b", "a\\b", "c:", "a\0", "a\n", "x" * 129)))
