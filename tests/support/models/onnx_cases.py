"""ONNX files as models: a process of its own, for `test_source_onnx`. It prints its results as JSON.

The networks are built operation by operation, with the weights of one that torch computes.
"""

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sidelight_server.models import sources

from support.models.sources import N_CLASSES, SHAPE, examples, expected_maps, net, refusal, served_maps

CLASSIFIER = "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"  # which way up a line of text is, in rapidocr-onnxruntime


def network(n: int | str, *, inputs: Sequence[str] = ("x",), last: str = "Gemm") -> onnx.ModelProto:
    module = net()
    state = {name.replace(".", "_"): each.numpy() for name, each in module.state_dict().items()}
    initializers = [numpy_helper.from_array(each, name) for name, each in state.items() if each.ndim]
    norm = ["norm_weight", "norm_bias", "norm_running_mean", "norm_running_var"]
    nodes = [
        helper.make_node("Conv", ["x", "convolution_weight", "convolution_bias"], ["a"], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["a", *norm], ["b"], epsilon=module.norm.eps),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"], axis=1),
        helper.make_node(last, ["e", "linear_weight", "linear_bias"], ["y0"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [n, *SHAPE]) for name in inputs],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, [n, N_CLASSES])],
        initializers,
    )
    domains = [helper.make_opsetid("", 15)]
    if last != "Gemm":
        nodes[-1].domain = "of.nobody"
        graph.node[-1].domain = "of.nobody"
        domains.append(helper.make_opsetid("of.nobody", 1))
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


def exported(*, last: str = "Gemm") -> onnx.ModelProto:
    """As torch.onnx.export writes the network by default: in newer operators, and a batch of any size.

    Its last bias has a second name besides, as the older exporter gives weights that are equal.
    """
    held = network("N")
    graph = held.graph
    del graph.node[3:5]  # the pool, and what flattens it
    graph.node.insert(3, helper.make_node("ReduceMean", ["c", "axes"], ["d"], keepdims=0, noop_with_empty_axes=0))
    graph.node.insert(4, helper.make_node("Reshape", ["d", "flat"], ["e"], allowzero=1))
    graph.node.insert(5, helper.make_node("Identity", ["linear_bias"], ["another_bias"]))
    graph.node[-1].input[2] = "another_bias"
    if last != "Gemm":
        graph.node[-1].output[0] = "f"
        graph.node.append(helper.make_node(last, ["f"], ["y0"]))
    graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 6]), "flat"))
    held.opset_import[0].version = 20
    onnx.checker.check_model(held, full_check=True)
    return held


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def known(source: str) -> list[object]:
    spec = sources.load(source)
    return [spec.batch, spec.input_size]


def external(name: str, location: str) -> str:
    """Write a network whose first weights refer to another file."""
    held = network("N")
    first = held.graph.initializer[0]
    Path("weights.bin").write_bytes(first.raw_data)
    first.data_location = TensorProto.EXTERNAL
    first.external_data.add(key="location", value=location)
    first.ClearField("raw_data")
    Path(name).write_bytes(held.SerializeToString())
    return f"onnx:{name}"


def packaged(found: dict[str, object]) -> None:
    where = importlib.util.find_spec("rapidocr_onnxruntime")
    path = Path(where.submodule_search_locations[0]) / CLASSIFIER
    x = torch.rand(2, 3, 48, 192, generator=torch.Generator().manual_seed(0), requires_grad=True)
    module = sources.load(f"onnx:{path}").module
    outputs = module(x)
    held = onnx.load(str(path))
    held.opset_import[0].version = 15  # of the older ones the reference normalizes as in training
    (expected,) = ReferenceEvaluator(held).run(None, {held.graph.input[0].name: x.detach().numpy()})
    found["packaged outputs"] = float(np.abs(outputs.detach().numpy() - expected).max())
    found["packaged gradient"] = float(torch.autograd.grad(outputs[:, 0].sum(), x)[0].abs().max())


def main() -> None:
    found: dict[str, object] = {}
    onnx.save(network("N"), "net.onnx")
    onnx.save(network(2), "static.onnx")
    found["dynamic"], found["static"] = known("onnx:net.onnx"), known("onnx:static.onnx")
    x = examples(5)
    found["served"] = difference(served_maps("onnx:net.onnx", x), expected_maps(net(), x))
    found["served static"] = difference(served_maps("onnx:static.onnx", x), expected_maps(net(), x))
    packaged(found)

    onnx.save(exported(), "exported.onnx")
    found["exported"] = known("onnx:exported.onnx")
    found["served exported"] = difference(served_maps("onnx:exported.onnx", x), expected_maps(net(), x))
    found["outputs exported"] = difference(
        sources.load("onnx:exported.onnx").module(x).detach().numpy(), net()(x).detach().numpy()
    )
    onnx.save(exported(last="Gelu"), "gelu.onnx")
    found["an operator of a newer set"] = refusal("onnx:gelu.onnx")

    source = external("beside.onnx", "weights.bin")
    got = sources.load(source).module(x)
    found["watched"] = [each.name for each in sources.files(source)]
    found["external"] = difference(got.detach().numpy(), net()(x).detach().numpy())
    Path("../secret.bin").write_bytes(Path("weights.bin").read_bytes())
    found["weights in another folder"] = refusal(external("outside.onnx", "../secret.bin"))
    found["weights anywhere"] = refusal(external("anywhere.onnx", str(Path("../secret.bin").resolve())))

    Path("folder.onnx").mkdir()
    Path("half.onnx").write_bytes(Path("net.onnx").read_bytes()[:1000])
    Path("text.onnx").write_text("weights\n")
    Path("empty.onnx").touch()
    onnx.save(network(2, inputs=("x", "y")), "two.onnx")
    onnx.save(network(2, last="Strange"), "strange.onnx")
    found["an operator that has no equal"] = refusal("onnx:strange.onnx")
    found["two inputs"] = refusal("onnx:two.onnx")
    found["missing"] = refusal("onnx:gone.onnx")
    for name in ("folder", "half", "text", "empty"):
        found[name] = refusal(f"onnx:{name}.onnx")
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of onnx2torch's own modules, as they run
    main()
