"""The key maps name exactly the tensors that diffusers and transformers have, at real sizes."""

from collections import Counter
from math import prod

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from sana_export.reference.dc_ae import AutoencoderConfig, Decoder, Encoder
from sana_export.reference.transformer import LinearTransformer, TransformerConfig
from sana_export.weights.architecture import UPSTREAM_OF, Config, UpstreamComponent, layout
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_export.weights.key_map import assemblies, heads_to_qkv, official_parts, official_shapes
from sana_export.weights.random_model import random_model_names

COMPONENTS: tuple[UpstreamComponent, ...] = ("text_encoder", "transformer", "vae")
# Parameters and tensors of the released transformers.
RELEASED = {
    "random:0.6b": ("sana-0.6b", 591_747_872, 548),
    "random:1.6b": ("sana-1.6b", 1_604_462_752, 396),
    "random:1.6b-2k": ("sana-1.6b", 1_604_462_752, 396),
    "random:1.6b-4k": ("sana-1.6b", 1_604_462_752, 396),
    "random:1.5-1.6b": ("sana-1.5-1.6b", 1_604_641_952, 476),
    "random:1.5-4.8b": ("sana-1.5-4.8b", 4_721_825_952, 1396),
    "random:sprint-0.6b": ("sana-sprint-0.6b", 593_501_216, 664),
    "random:sprint-1.6b": ("sana-sprint-1.6b", 1_610_237_472, 480),
}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def upstream_module(component: UpstreamComponent, config: Config) -> nn.Module:
    with torch.device("meta"):
        if component == "transformer":
            return SanaTransformer2DModel.from_config(config)
        if component == "vae":
            return AutoencoderDC.from_config(config)
        return Gemma2Model(Gemma2Config(**config))


@pytest.mark.parametrize("model", random_model_names())
def test_the_maps_name_every_upstream_tensor_with_its_shape(model: str) -> None:
    checkpoint = open_checkpoint(model)
    for component in COMPONENTS:
        module = upstream_module(component, checkpoint.config(component))
        assert checkpoint.upstream_shapes(component) == shapes_of(module), component


@pytest.mark.parametrize(("model", "expected"), RELEASED.items(), ids=RELEASED.keys())
def test_released_architectures_have_their_published_size(model: str, expected: tuple[str, int, int]) -> None:
    checkpoint = open_checkpoint(model)
    shapes = checkpoint.upstream_shapes("transformer")
    assert (checkpoint.architecture, sum(map(prod, shapes.values())), len(shapes)) == expected
    assert checkpoint.guidance == ("embedded" if "sprint" in model else "classifier_free")


def test_the_autoencoder_has_its_published_size() -> None:
    checkpoint = open_checkpoint("random:1.6b")
    decoder, encoder = (checkpoint.reference_shapes(part) for part in ("vae_decoder", "vae_encoder"))
    assert sum(map(prod, decoder.values())) == 159_223_171
    assert sum(map(prod, encoder.values())) == 153_027_104
    assert len(checkpoint.upstream_shapes("vae")) == 375


@pytest.mark.parametrize("model", random_model_names())
def test_every_upstream_tensor_is_used_once(model: str) -> None:
    checkpoint = open_checkpoint(model)
    for reference, upstream in UPSTREAM_OF.items():
        found = assemblies(reference, layout(reference, checkpoint.config(upstream)))
        used = Counter(name for assembly in found for name in assembly.upstream)
        assert set(used.values()) == {1}, [name for name, count in used.items() if count > 1]
        assert len({assembly.reference for assembly in found}) == len(found)
        for assembly in found:
            assert prod(assembly.shape) == len(assembly.upstream) * prod(assembly.part_shape), assembly


@pytest.mark.parametrize("model", ["random:tiny", "random:1.6b", "random:1.5-4.8b", "random:sprint-0.6b"])
def test_the_maps_fill_the_reference_modules(model: str) -> None:
    checkpoint = open_checkpoint(model)
    autoencoder = AutoencoderConfig.from_upstream(checkpoint.vae_config)
    with torch.device("meta"):
        transformer = LinearTransformer(TransformerConfig.from_upstream(checkpoint.transformer_config))
        decoder, encoder = Decoder(autoencoder), Encoder(autoencoder)
    assert checkpoint.reference_shapes("transformer") == shapes_of(transformer)
    assert checkpoint.reference_shapes("vae_decoder") == shapes_of(decoder)
    assert checkpoint.reference_shapes("vae_encoder") == shapes_of(encoder)


@pytest.mark.parametrize("model", RELEASED)
def test_the_official_map_holds_every_upstream_tensor_once(model: str) -> None:
    checkpoint = open_checkpoint(model)
    parts = official_parts(layout("transformer", checkpoint.transformer_config))
    shapes = checkpoint.upstream_shapes("transformer")
    assert Counter(name for names in parts.values() for name in names) == Counter(list(shapes))
    official = official_shapes(parts, shapes)
    assert sum(map(prod, official.values())) == sum(map(prod, shapes.values()))
    width = official["x_embedder.proj.weight"][0]
    assert official["blocks.0.attn.qkv.weight"] == (3 * width, width)
    assert official["blocks.0.cross_attn.kv_linear.bias"] == (2 * width,)


def test_heads_to_qkv_gathers_the_queries_of_all_heads_first() -> None:
    # Upstream's stack: q, k, v of head 0, then q, k, v of head 1; two rows each.
    stack = torch.tensor([[0], [1], [100], [101], [200], [201], [2], [3], [102], [103], [202], [203]])
    assert heads_to_qkv(stack, 2).flatten().tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]


def test_weights_are_the_upstream_tensors_joined() -> None:
    checkpoint = open_checkpoint("random:tiny")
    upstream = {name: tensor.load() for name, tensor in checkpoint.upstream_weights("transformer").items()}
    loaded = load_all(checkpoint)
    prefix = "transformer_blocks.1."
    q, k, v = (upstream[f"{prefix}attn1.to_{part}.weight"] for part in "qkv")
    assert torch.equal(loaded["blocks.1.linear_attention.qkv.weight"], torch.cat([q, k, v]))
    key, value = (upstream[f"{prefix}attn2.to_{part}.bias"] for part in "kv")
    assert torch.equal(loaded["blocks.1.cross_attention.to_kv.bias"], torch.cat([key, value]))
    point = upstream[f"{prefix}ff.conv_point.weight"]
    assert torch.equal(loaded["blocks.1.mix_ffn.conv_point.weight"], point[:, :, 0, 0])


def load_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    loaded = {}
    for name, tensor in checkpoint.weights("transformer").items():
        loaded[name] = tensor.load()
        assert (tuple(loaded[name].shape), loaded[name].dtype) == (tensor.shape, tensor.dtype), name
    return loaded
