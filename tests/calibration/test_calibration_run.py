"""Calibration sees real denoising, gives the same digest twice, and goes on after an interruption."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sana_calibration.gptq import gptq
from sana_calibration.observers import observing
from sana_calibration.quantize import quantize_weight
from sana_calibration.recipe import LayerRule, PerTensor, Recipe, load_recipe
from sana_calibration.rules import Exclusion
from sana_calibration.scales import Scales
from sana_export import calibration_run
from sana_export.calibration_run import NEGATIVE, DenoisingRun, calibrate, rules_of
from sana_export.weights.architecture import ReferenceComponent
from sana_export.weights.checkpoint import Checkpoint, open_checkpoint
from sana_export.weights.lazy import LazyTensor
from sana_export.weights.random_model import RandomCheckpoint
from sana_runtime.contract import COMPONENTS
from sana_runtime.errors import InputError
from sana_runtime.pipeline import draw_noise, seeded_generator

PROMPTS = ("a red circle", "雨の夜 🐙", "ein sehr langer Satz über nichts")
# Not square, 3 x 5 latent.
SAMPLING = "flow_dpm_solver, flow shift 3.0, 1000 timesteps, sigma_data 0.5, guidance 4.5"
SIZE = {"height": 96, "width": 160}


def run(
    folder: Path,
    recipe: Recipe | str = "int8",
    *,
    model: str | Checkpoint = "random:tiny",
    prompts: Sequence[str] = PROMPTS,
    seed: int = 3,
    num_steps: int = 4,
    on_progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> Scales:
    return calibrate(
        open_checkpoint(model) if isinstance(model, str) else model,
        load_recipe(recipe) if isinstance(recipe, str) else recipe,
        prompts,
        seed=seed,
        num_steps=num_steps,
        work_folder=folder,
        on_progress=on_progress,
        **SIZE,
    )


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Scales:
    return run(tmp_path_factory.mktemp("calibration"))


def test_every_layer_that_is_smoothed_is_named_while_it_is(tmp_path: Path) -> None:
    """The search takes seconds per layer of a real model, and comes when all prompts are painted."""
    told: list[tuple[float, str]] = []
    made = run(tmp_path, num_steps=1, on_progress=lambda fraction, text: told.append((fraction, text)))
    smoothed = [
        f"smoothing transformer, {name}"
        for name, found in made.component("transformer").items()
        if found.alpha_errors is not None
    ]
    assert smoothed
    assert [text for _, text in told if text.startswith("smoothing")] == smoothed
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)


def with_histograms() -> Recipe:
    """The int8 recipe with percentile scales everywhere: histograms must resume, too."""
    recipe = load_recipe("int8")
    changes: dict = {"smoothing_alpha": None, "amax": "percentile", "percentile": 99.9}
    rules = tuple(replace(rule, **changes) if rule.activation_dtype else rule for rule in recipe.rules)
    return replace(recipe, rules=rules)


class Interrupted(Exception):
    """What Ctrl-C would be."""


@pytest.mark.parametrize(
    "moment",
    ["text_encoder, prompt 2", "transformer, prompt 2 of 3, step 3", "loading vae_decoder", "vae_decoder, prompt 3"],
)
def test_interrupted_run_resumes_to_the_same_digest(moment: str, scales: Scales, tmp_path: Path) -> None:
    redone = interrupt_and_resume(tmp_path, load_recipe("int8"), moment)
    assert redone[-1] == scales.digest
    assert not any(text.startswith("text_encoder, negative") for text in redone), "what was done is not done again"


def test_interrupted_histograms_resume_to_the_same_digest(tmp_path: Path) -> None:
    redone = interrupt_and_resume(tmp_path / "a", with_histograms(), "transformer, prompt 3 of 3, step 2")
    assert redone[-1] == run(tmp_path / "b", with_histograms()).digest
    assert not any(text.startswith("transformer, prompt 2") for text in redone)


def searching(candidates: tuple[float, ...] = ()) -> Recipe:
    """int8 with a search wherever the shipped recipe smooths."""
    recipe = load_recipe("int8")
    changes: dict = {"smoothing_alpha": "search", "smoothing_candidates": candidates}
    rules = tuple(rule if rule.smoothing_alpha is None else replace(rule, **changes) for rule in recipe.rules)
    return replace(recipe, rules=rules)


def test_interrupted_search_resumes_to_the_same_digest(tmp_path: Path) -> None:
    redone = interrupt_and_resume(tmp_path / "a", searching(), "transformer, prompt 3 of 3, step 2")
    whole = run(tmp_path / "b", searching())
    assert redone[-1] == whole.digest
    assert run(tmp_path / "c", searching((0.5, 0.75))).digest != whole.digest


def rounding() -> Recipe:
    """The INT4 recipe, whose rounding is calibrated, for one block of the transformer."""
    recipe = load_recipe("int4-weight-only")
    return replace(recipe, exclusions=(*recipe.exclusions, Exclusion("transformer", "blocks.1.*", "to have less")))


@pytest.mark.parametrize(
    "moment",
    ["transformer, prompt 2 of 3, step 3", "rounding transformer, blocks.0.linear_attention.to_out"],
)
def test_interrupted_rounding_resumes_to_the_same_digest(moment: str, tmp_path: Path) -> None:
    redone = interrupt_and_resume(tmp_path / "a", rounding(), moment)
    assert redone[-1] == run(tmp_path / "b", rounding()).digest
    assert not any(text.startswith("transformer, prompt 1") for text in redone)


def test_a_prompt_cut_off_behind_its_sums_is_not_added_twice(tmp_path: Path) -> None:
    """As a kill between two files leaves it: what the prompt saw is in the sums, its own file is not there."""
    whole = run(tmp_path, rounding())
    (prompt,) = tmp_path.glob("*/transformer/0001.safetensors")
    prompt.unlink()
    for rounded in tmp_path.glob("*/transformer/rounded/*"):
        rounded.unlink()
    assert run(tmp_path, rounding()).digest == whole.digest


def test_prompts_whose_sums_are_not_written_yet_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing is slow it is rare; a kill, which leaves no time to write, costs more than the prompt it met."""
    monkeypatch.setattr(calibration_run, "_WORK_PER_WRITE", 1e9)
    whole = run(tmp_path / "a", rounding())
    killed = pytest.MonkeyPatch()

    def kill(_: float, text: str) -> None:
        if text.startswith("transformer, prompt 3 of 3, step 2"):
            killed.setattr(calibration_run._Kept, "write", lambda kept: None)
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "b", rounding(), on_progress=kill)
    killed.undo()
    redone: list[str] = []
    assert run(tmp_path / "b", rounding(), on_progress=lambda _, text: redone.append(text)).digest == whole.digest
    assert not any(text.startswith("transformer, prompt 1 of 3") for text in redone)
    assert any(text.startswith("transformer, prompt 2 of 3") for text in redone)


def test_codes_are_those_for_what_the_layer_saw(tmp_path: Path) -> None:
    """Of every step, both halves of guidance and all prompts."""
    checkpoint, recipe = open_checkpoint("random:tiny"), rounding()
    found = run(tmp_path / "a", recipe).component("transformer")
    denoising = DenoisingRun(checkpoint, PROMPTS, 3, 4, 96, 160, tmp_path / "b")
    plan = denoising.plans["transformer"]
    rules = rules_of(recipe, plan)
    assert {*found} == {*rules}
    rounded = {name: rule for name, rule in rules.items() if rule.rounding == "gptq"}
    assert {name for name, scales in found.items() if scales.weight_codes is not None} == {*rounded}
    with denoising.module("text_encoder") as encoder:
        captions = {index: denoising.caption(encoder, index) for index in (NEGATIVE, *range(len(PROMPTS)))}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in rounded}
    with denoising.module("transformer") as module:
        for name in rounded:
            module.get_submodule(plan.prefix + name).register_forward_pre_hook(
                lambda _, given, name=name: rows[name].append(given[0].flatten(0, -2).double())
            )
        for index in range(len(PROMPTS)):
            for _ in denoising.denoise(module, denoising.caption_batch(captions, index), index):
                pass
        for name, rule in rounded.items():
            x = torch.cat(rows[name])
            # As the graph stores it.
            weight = module.get_submodule(plan.prefix + name).weight.detach().bfloat16().float()
            exact = gptq(weight, (x.T @ x).float(), rule, torch.bfloat16)
            codes = found[name].weight_codes
            assert codes is not None
            # Sums in fp32 and in another order can move a weight over a rounding boundary, and others with it.
            assert (codes != exact.values.numpy()).mean() < 0.01
            assert (codes != quantize_weight(weight, rule, scale_dtype=torch.bfloat16).values.numpy()).mean() > 0.05


def test_a_search_keeps_what_it_found_in_the_cache(scales: Scales, tmp_path: Path) -> None:
    """Taken alphas and every candidate's error survive the file; the factor is that of the alpha taken."""
    checkpoint, recipe = open_checkpoint("random:tiny"), searching((0.25, 0.5, 0.75))
    found = run(tmp_path, recipe)
    found.save(tmp_path / "cache")
    weights = {name: checkpoint.digest(name) for name in COMPONENTS}
    read = Scales.load(tmp_path / "cache", weights=weights, recipe=recipe.digest, sampling=SAMPLING)
    assert read.digest == found.digest
    searched = {name: layer for name, layer in read.component("transformer").items() if layer.alpha_errors is not None}
    assert {*searched} == {
        name for name, one in scales.component("transformer").items() if one.smooth_factor is not None
    }
    for name, layer in searched.items():
        errors = dict(zip((None, 0.25, 0.5, 0.75), layer.alpha_errors.tolist(), strict=True))
        assert errors[layer.smoothing_alpha] == min(errors.values()), name
        assert (layer.smooth_factor is None) == (layer.smoothing_alpha is None)
        fixed = {}
        if layer.smoothing_alpha is not None:
            rules = replace(recipe, rules=tuple(with_alpha(rule, layer.smoothing_alpha) for rule in recipe.rules))
            fixed = run(tmp_path / f"{layer.smoothing_alpha}", rules).component("transformer")
            np.testing.assert_array_equal(fixed[name].smooth_factor, layer.smooth_factor)
            assert fixed[name].activation_amax == layer.activation_amax
    assert len({layer.smoothing_alpha for layer in searched.values()}) > 1, "layers that differ take different alphas"


def with_alpha(rule: LayerRule, alpha: float) -> LayerRule:
    if rule.smoothing_alpha is None:
        return rule
    return replace(rule, smoothing_alpha=alpha, smoothing_candidates=())


def interrupt_and_resume(folder: Path, recipe: Recipe, moment: str) -> list[str]:
    """What the second run reported, and at last its digest."""

    def interrupt(_: float, text: str) -> None:
        if text.startswith(moment):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(folder, recipe, on_progress=interrupt)
    redone: list[str] = []
    digest = run(folder, recipe, on_progress=lambda _, text: redone.append(text)).digest
    return [*redone, digest]


def test_twice_gives_the_same_digest_reuses_progress_and_remakes_what_is_damaged(
    scales: Scales, tmp_path: Path
) -> None:
    fractions: list[float] = []
    assert run(tmp_path, on_progress=lambda fraction, _: fractions.append(fraction)).digest == scales.digest
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert len(set(fractions)) > 3 * 4, "every step of every prompt"
    texts: list[str] = []
    assert run(tmp_path, on_progress=lambda _, text: texts.append(text)).digest == scales.digest
    assert [text for text in texts if not text.startswith("smoothing")] == ["calibrated"], "nothing is painted again"
    (path,) = tmp_path.glob("*/transformer/0001.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert run(tmp_path).digest == scales.digest


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"num_steps": 5}, {"prompts": PROMPTS[::-1]}, {"recipe": "fp8"}], ids=str
)
def test_other_arguments_give_another_digest(change: dict, scales: Scales, tmp_path: Path) -> None:
    assert run(tmp_path, **change).digest != scales.digest


def test_progress_of_other_arguments_is_not_mixed_in(scales: Scales, tmp_path: Path) -> None:
    run(tmp_path, seed=4, prompts=PROMPTS[:1])
    assert run(tmp_path).digest == scales.digest


def test_scales_are_those_of_the_pipelines_own_loop(scales: Scales) -> None:
    """The same amax from a loop written here: tokens, both guidance halves, four solver steps, in fp32."""
    checkpoint = open_checkpoint("random:tiny")
    rules = {"blocks.1.mix_ffn.conv_point": LayerRule("transformer", "*", "int8", "int8", PerTensor())}
    maxima = np.zeros(4, np.float32)
    with torch.inference_mode():
        for index in range(len(PROMPTS)):
            for step, latent_amax in enumerate(_one_picture(checkpoint, index, rules)):
                maxima[step] = max(maxima[step], latent_amax)
    found = scales.component("transformer")["blocks.1.mix_ffn.conv_point"].step_amax
    assert found is not None
    np.testing.assert_array_equal(found, maxima)
    assert len(set(maxima.tolist())) == 4, "steps differ, so keeping them apart means something"


def _one_picture(checkpoint: Checkpoint, index: int, rules: dict[str, LayerRule]) -> list[float]:
    """The amax of the layer at every step, by diffusers' formulas rather than by the run under test."""
    import tempfile

    from sana_export.components import loaded_module, plan_components
    from sana_export.prompting import scheduler_entry, tokenizer_entry
    from sana_runtime.scheduler import step_table
    from sana_runtime.tokenizer import CaptionTokenizer

    content = checkpoint.tokenizer_json()
    entry = tokenizer_entry(content, "tokenizer.json", "SanaPipeline")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(content)
        tokenizer = CaptionTokenizer(Path(folder), entry)
    encoder, transformer, _ = (
        loaded_module(plan, checkpoint) for plan in plan_components(checkpoint, "fp32", 96, 160, entry.padded_length)
    )
    embeds, masks = [], []
    for text, negative in (("", True), (PROMPTS[index], False)):
        tokens = tokenizer.encode(text, negative=negative)
        hidden = encoder(torch.from_numpy(tokens.caption_tokens), torch.from_numpy(tokens.caption_mask))
        tail = slice(tokens.tail_start, tokens.tail_start + 299)
        embeds.append(torch.cat([hidden[:, :1], hidden[:, tail]], dim=1))
        masks.append(torch.from_numpy(np.concatenate([tokens.caption_mask[:, :1], tokens.caption_mask[:, tail]], 1)))
    scheduler = scheduler_entry(checkpoint)
    table = step_table(scheduler, 4)
    latent = torch.from_numpy(draw_noise(seeded_generator(3 + index), (1, 32, 3, 5)))
    x0 = torch.zeros_like(latent)
    maxima = []
    seen: list[float] = []
    layer = transformer.get_submodule("transformer." + next(iter(rules)))
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].abs().max())))
    for step in range(4):
        latent, x0, _ = transformer(
            latent,
            x0,
            torch.cat(embeds),
            torch.cat(masks),
            torch.tensor(float(table.timesteps[step])),
            torch.tensor(float(table.sigmas[step])),
            torch.tensor(table.coefficients[step], dtype=torch.float32),
            torch.tensor(scheduler.default_guidance_scale),
        )
        maxima.append(seen[-1])
    handle.remove()
    return maxima


def test_both_guidance_halves_are_seen(denoising: object, tmp_path: Path) -> None:
    """The negative half's activations reach the observers: without them some amax is smaller."""
    picture: DenoisingRun = denoising.run  # type: ignore[attr-defined]
    rules = rules_of(load_recipe("fp8"), picture.plans["transformer"])
    prefix = picture.plans["transformer"].prefix
    amax: dict[str, dict[str, float]] = {}
    with picture.module("text_encoder") as encoder:
        captions = {index: picture.caption(encoder, index) for index in (NEGATIVE, 0)}
    with picture.module("transformer") as module, observing(module, prefix, rules, 3) as observers:
        batches = {"both": picture.caption_batch(captions, 0)}
        batches["positive"] = {name: np.concatenate([array[1:]] * 2) for name, array in batches["both"].items()}
        for name, batch in batches.items():
            *_, _ = picture.denoise(module, batch, 0)
            amax[name] = {layer: seen.amax for layer, seen in observers.take().items()}
    attention = "blocks.0.cross_attention.to_out"
    assert amax["both"][attention] != amax["positive"][attention]


def test_sprint_has_one_half_and_fresh_noise(tmp_path: Path) -> None:
    found = run(tmp_path / "a", model="random:tiny-sprint", num_steps=2)
    assert found.digest == run(tmp_path / "b", model="random:tiny-sprint", num_steps=2).digest
    assert not [*tmp_path.glob("a/*/text_encoder/negative.safetensors")]
    steps = found.component("transformer")["blocks.0.linear_attention.qkv"].step_amax
    assert steps is not None
    assert (steps > 0).all()


def test_weight_only_recipe_runs_nothing(tmp_path: Path) -> None:
    texts: list[str] = []
    found = run(tmp_path, "int8-weight-only", on_progress=lambda _, text: texts.append(text))
    assert texts == ["calibrated"]
    assert all(layer.activation_amax is None for name in COMPONENTS for layer in found.component(name).values())
    assert all(found.component(name) for name in COMPONENTS)


def test_every_active_layer_has_scales_and_the_cache_is_small(scales: Scales, tmp_path: Path) -> None:
    checkpoint, recipe = open_checkpoint("random:tiny"), load_recipe("int8")
    picture = DenoisingRun(checkpoint, PROMPTS, 3, 4, 96, 160, tmp_path)
    for name in COMPONENTS:
        rules = rules_of(recipe, picture.plans[name])
        found = scales.component(name)
        assert {*found} == {*rules}
        for layer, rule in rules.items():
            assert (found[layer].activation_amax is None) == (rule.activation_dtype is None), layer
            assert (found[layer].smooth_factor is None) == (rule.smoothing_alpha is None), layer
    path = tmp_path / "scales.safetensors"
    scales.save(path)
    assert path.stat().st_size < 32 << 10
    weights = {name: checkpoint.digest(name) for name in COMPONENTS}
    assert Scales.load(path, weights=weights, recipe=recipe.digest, sampling=SAMPLING).digest == scales.digest
    other = open_checkpoint("random:tiny-qknorm")
    with pytest.raises(InputError, match="another model"):
        Scales.load(
            path, weights={name: other.digest(name) for name in COMPONENTS}, recipe=recipe.digest, sampling=SAMPLING
        )


class Poisoned(RandomCheckpoint):
    """A checkpoint with one value replaced in one weight."""

    def __init__(self, component: ReferenceComponent, layer: str, value: float) -> None:
        super().__init__("random:tiny")
        self._poison = component, layer, value

    def weights(self, component: ReferenceComponent) -> dict[str, LazyTensor]:
        found = super().weights(component)
        poisoned, layer, value = self._poison
        if component == poisoned:
            tensor = found[layer]
            found[layer] = replace(tensor, load=lambda: self._replaced(tensor.load().clone(), value))
        return found

    @staticmethod
    def _replaced(tensor: torch.Tensor, value: float) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(value: float, tmp_path: Path) -> None:
    poisoned = Poisoned("transformer", "blocks.0.mix_ffn.conv_depth.bias", value)
    with pytest.raises(InputError) as error:
        run(tmp_path, model=poisoned)
    message = str(error.value)
    for part in ("layer 'blocks.0.mix_ffn.conv_point'", "prompt 1 of 3 ('a red circle')", "step 1 of 4"):
        assert part in message


@pytest.mark.parametrize(
    ("component", "tensor", "says"),
    [
        ("text_encoder", "norm.weight", "text_encoder gives embeds"),
        ("transformer", "proj_out.bias", "layer 'blocks.0.linear_attention.qkv' is not finite"),
        ("vae_decoder", "conv_in.bias", "layer 'stages.2.blocks.0.conv1' is not finite"),
    ],
)
def test_output_that_is_not_finite_is_found(
    component: ReferenceComponent, tensor: str, says: str, tmp_path: Path
) -> None:
    """Also outside the watched layers: the next one that is watched, or the component's own output, says so."""
    with pytest.raises(InputError) as error:
        run(tmp_path, model=Poisoned(component, tensor, float("nan")))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"prompts": ()}, "without prompts"), ({"num_steps": 0}, "number of steps"), ({"prompts": (3,)}, "not text")],
    ids=["no prompts", "no steps", "no text"],
)
def test_wrong_use_is_an_error(change: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        run(tmp_path, **change)
