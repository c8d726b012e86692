"""Write the small binary fixtures of tests/runtime: tiny ONNX components and a tiny tokenizer.

    python scripts/make_goldens.py

They follow the graph contract at toy sizes, so that the runtime's tests need neither onnx nor torch. The
sidecar goldens.json names seed, command and versions. Running the script again writes the same files.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sana_runtime.contract import TensorSpec, text_encoder_io, transformer_io, vae_decoder_io

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "runtime" / "fixtures"
SEED = 20260101
CAPTION_CHANNELS = 8
LATENT_HEIGHT, LATENT_WIDTH = 2, 3
PADDED_LENGTH = 302
WORDS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "draw",
    "this",
    ":",
    "a",
    "red",
    "fox",
    "in",
    "the",
    "snow",
    "blurry",
]
OPSET = 20
ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}


class Graph:
    """Collects nodes and constants; values are referred to by name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        """Append one node with one output and return the output's name."""
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, array: np.ndarray) -> str:
        """Append one initializer and return its name."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def write(self, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], path: Path) -> None:
        """Check the model and write it."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [_info(spec) for spec in inputs],
            [_info(spec) for spec in outputs],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString(deterministic=True))


def _info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, ELEMENT_TYPES[spec.dtype], spec.shape)


def write_tokenizer(path: Path) -> None:
    """Words split at white space, BOS in front, as Gemma's tokenizer.json does it."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.save(str(path), pretty=False)


def write_text_encoder(path: Path, generator: np.random.Generator) -> None:
    """caption_embeds = (table[token] + position / 100) * mask."""
    graph = Graph()
    table = graph.constant(generator.standard_normal((len(WORDS), CAPTION_CHANNELS)).astype(np.float32))
    positions = graph.constant((np.arange(PADDED_LENGTH, dtype=np.float32) / 100).reshape(1, -1, 1))
    mask = graph.add("Cast", "caption_mask", to=TensorProto.FLOAT)
    mask = graph.add("Unsqueeze", mask, graph.constant(np.array([2])))
    rows = graph.add("Add", graph.add("Gather", table, "caption_tokens"), positions)
    graph.add("Mul", rows, mask, output="caption_embeds")
    graph.write("text_encoder", *text_encoder_io("float32", CAPTION_CHANNELS, PADDED_LENGTH), path)


def write_transformer(path: Path, guidance: str, generator: np.random.Generator) -> None:
    """A whole solver step around velocity = latent / 4 + mean(caption) W + timestep W'."""
    graph = Graph()
    weight = graph.constant(generator.standard_normal((CAPTION_CHANNELS, 32)).astype(np.float32) / 4)
    time_weight = graph.constant(generator.standard_normal((1, 32, 1, 1)).astype(np.float32) / 1000)
    mask = graph.add("Unsqueeze", "caption_mask", graph.constant(np.array([2])))
    mask = graph.add("Cast", mask, to=TensorProto.FLOAT)
    axis = graph.constant(np.array([1]))
    total = graph.add("ReduceSum", graph.add("Mul", "caption_embeds", mask), axis, keepdims=0)
    mean = graph.add("Div", total, graph.add("ReduceSum", mask, axis, keepdims=0))
    caption = graph.add("Unsqueeze", graph.add("MatMul", mean, weight), graph.constant(np.array([2, 3])))
    bias = graph.add("Add", caption, graph.add("Mul", time_weight, "timestep"))
    add_step = _add_guided_step if guidance == "classifier_free" else _add_trigflow_step
    add_step(graph, bias)
    a, b, c = (graph.add("Gather", "step_coefficients", graph.constant(np.array(i))) for i in range(3))
    ax = graph.add("Mul", a, "latent")
    bx = graph.add("Mul", b, "x0")
    cx = graph.add("Mul", c, "previous_x0")
    graph.add("Add", graph.add("Add", ax, bx), cx, output="next_latent")
    io = transformer_io("float32", CAPTION_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH, guidance)  # type: ignore[arg-type]
    graph.write("transformer", *io, path)


def _add_velocity(graph: Graph, model_input: str, bias: str) -> str:
    return graph.add("Add", graph.add("Mul", model_input, graph.constant(np.float32(0.25))), bias)


def _add_guided_step(graph: Graph, bias: str) -> None:
    both = _add_velocity(graph, graph.add("Concat", "latent", "latent", axis=0), bias)
    halves = ["unconditional", "conditional"]
    graph.nodes.append(helper.make_node("Split", [both], halves, axis=0, num_outputs=2))
    difference = graph.add("Sub", "conditional", "unconditional")
    guided = graph.add("Mul", "guidance_scale", difference)
    graph.add("Add", "unconditional", guided, output="velocity")
    graph.add("Sub", "latent", graph.add("Mul", "sigma", "velocity"), output="x0")


def _add_trigflow_step(graph: Graph, bias: str) -> None:
    one, two, half = (graph.constant(np.float32(value)) for value in (1, 2, 0.5))
    rest = graph.add("Sub", one, "timestep")
    norm = graph.add(
        "Sqrt",
        graph.add("Add", graph.add("Mul", "timestep", "timestep"), graph.add("Mul", rest, rest)),
    )
    model_input = graph.add("Mul", graph.add("Div", "latent", half), norm)
    plain = _add_velocity(graph, model_input, bias)
    graph.add("Mul", plain, "guidance_embeds", output="velocity")
    linear = graph.add("Mul", graph.add("Sub", one, graph.add("Mul", two, "timestep")), model_input)
    curved = graph.add("Mul", graph.add("Mul", norm, norm), "velocity")
    direction = graph.add("Mul", half, graph.add("Div", graph.add("Add", linear, curved), norm))
    cosine, sine = graph.add("Div", rest, norm), graph.add("Div", "timestep", norm)
    kept = graph.add("Mul", cosine, "latent")
    graph.add("Sub", kept, graph.add("Mul", sine, direction), output="x0")


def write_vae_decoder(path: Path) -> None:
    """Pixels = 16 x + 128 of the first three channels, each position repeated over its 32 x 32 pixels."""
    graph = Graph()
    bounds = [graph.constant(np.array([value])) for value in (0, 3, 1)]
    rgb = graph.add("Slice", "latent", bounds[0], bounds[1], bounds[2])
    spread = graph.add("Reshape", rgb, graph.constant(np.array([1, 3, LATENT_HEIGHT, 1, LATENT_WIDTH, 1])))
    tiles = graph.constant(np.array([1, 3, LATENT_HEIGHT, 32, LATENT_WIDTH, 32]))
    pixels = graph.add("Expand", spread, tiles)
    size = graph.constant(np.array([1, 3, 32 * LATENT_HEIGHT, 32 * LATENT_WIDTH]))
    image = graph.add("Transpose", graph.add("Reshape", pixels, size), perm=[0, 2, 3, 1])
    scale, middle, low, high = (graph.constant(np.float32(value)) for value in (16, 128, 0, 255))
    level = graph.add("Add", graph.add("Mul", image, scale), middle)
    graph.add("Cast", graph.add("Clip", level, low, high), to=TensorProto.UINT8, output="image")
    graph.write("vae_decoder", *vae_decoder_io(LATENT_HEIGHT, LATENT_WIDTH), path)


def main() -> None:
    """Write every fixture and the sidecar."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    write_tokenizer(FIXTURES / "tokenizer.json")
    write_text_encoder(FIXTURES / "text_encoder.onnx", generator)
    write_transformer(FIXTURES / "transformer.onnx", "classifier_free", generator)
    write_transformer(FIXTURES / "transformer_sprint.onnx", "embedded", generator)
    write_vae_decoder(FIXTURES / "vae_decoder.onnx")
    sidecar = {
        "command": "python scripts/make_goldens.py",
        "seed": SEED,
        "versions": {
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "files": sorted(path.name for path in FIXTURES.iterdir() if path.name != "goldens.json"),
    }
    (FIXTURES / "goldens.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
