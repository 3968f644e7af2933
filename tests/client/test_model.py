"""Properties of the adapter layout, of the frozen base and of what is saved."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer, ParamWrapper

from client.adapter_layout import moe_layers
from client.base_model import BaseModel, base_model_loads, load_base
from client.bases import BaseIdentity
from client.model import AdaptedModel, adapted_model
from client.text import byte_tokenizer
from conf.model import ExpertTraining, LoraConfig, ModelConfig, Precision, RouterTraining
from tests.client.tiny_models import (
    DENSE_FAMILIES,
    MOE_FAMILIES,
    NUM_EXPERTS,
    TOP_K,
    random_tokens,
    save_tiny_base,
    tiny_model,
)

# Stock PEFT asks the model by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
LORA = LoraConfig(rank=3, alpha=6.0)
ALL_FAMILIES = (*MOE_FAMILIES, *DENSE_FAMILIES, "gpt2")


def adapt(family: str, lora: LoraConfig = LORA, dtype: torch.dtype = torch.float32, **settings: object) -> AdaptedModel:
    """A tiny base of ``family`` with room for an adapter, made in memory."""
    model = tiny_model(family).to(dtype).requires_grad_(False)
    identity = BaseIdentity(name=family, path="/bases/tiny", sha256="0" * 64, folder=Path("/bases/tiny"))
    return AdaptedModel(BaseModel(model, byte_tokenizer(), identity), ModelConfig(name=family, **settings), lora)


def random_adapter(adapted: AdaptedModel, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """An adapter whose every array moves the model: the initial one plus noise."""
    generator = np.random.default_rng(seed)
    initial = adapted.initial_adapter(seed=0)
    return {
        name: (array + 0.1 * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial.items()
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens()).logits


TRAININGS = [
    (ExpertTraining.lora, RouterTraining.frozen),
    (ExpertTraining.lora, RouterTraining.averaged),
    (ExpertTraining.full, RouterTraining.local),
    (ExpertTraining.frozen, RouterTraining.averaged),
]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_loading_and_reading_an_adapter_is_the_identity(family: str) -> None:
    adapted = adapt(family)
    adapter = random_adapter(adapted)
    adapted.load_adapter(adapter)
    read = adapted.read_adapter()
    assert read.keys() == adapter.keys()
    for name, array in adapter.items():
        np.testing.assert_array_equal(read[name], array)
        stored = adapted.from_canonical(name, array)
        assert stored.shape == adapted.parameters_by_name()[name].shape
        np.testing.assert_array_equal(adapted.to_canonical(name, stored), array)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_products_are_what_peft_adds_to_the_weights(family: str) -> None:
    """PEFT's own delta of each fused parameter is alpha / rank * B[e] @ A[e] for expert e.

    GPT-OSS stores its weights as (E, in, out), the others as (E, out, in).
    """
    adapted = adapt(family)
    adapter = random_adapter(adapted)
    adapted.load_adapter(adapter)
    wrappers = [
        (path.replace(".base_layer", ""), module)
        for path, module in adapted.model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
    ]
    assert len(wrappers) == 2 * len(adapted.layers)
    for path, module in wrappers:
        a_ERI = adapter[f"{path}.{module.parameter_name}.lora_A"]
        b_EOR = adapter[f"{path}.{module.parameter_name}.lora_B"]
        delta = module.get_delta_weight("default").detach().numpy()
        expected = np.stack([LORA.alpha / LORA.rank * b @ a for a, b in zip(a_ERI, b_EOR, strict=True)])
        expected = expected.swapaxes(1, 2) if family == "gpt_oss" else expected
        np.testing.assert_allclose(delta, expected, atol=1e-6)


def test_dense_products_are_what_peft_adds_to_the_weights() -> None:
    adapted = adapt("llama")
    adapter = random_adapter(adapted)
    adapted.load_adapter(adapter)
    for path, module in adapted.model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            expected = LORA.alpha / LORA.rank * adapter[f"{path}.lora_B"] @ adapter[f"{path}.lora_A"]
            np.testing.assert_allclose(module.get_delta_weight("default").detach(), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_an_experts_arrays_move_that_expert_alone(family: str) -> None:
    """Merged by hand into the base's weights, expert by expert, an adapter gives the same logits."""
    adapted = adapt(family, LoraConfig(rank=3, alpha=6.0, attention=False))
    adapter = random_adapter(adapted)
    adapted.load_adapter(adapter)
    merged = tiny_model(family)
    for layer in adapted.layers:
        for weight, expert in itertools.product(("gate_up_proj", "down_proj"), range(NUM_EXPERTS)):
            name = f"{layer}.experts.{weight}"
            delta = 2.0 * adapter[f"{name}.lora_B"][expert] @ adapter[f"{name}.lora_A"][expert]
            with torch.no_grad():
                merged.get_parameter(name)[expert] += torch.from_numpy(delta.T if family == "gpt_oss" else delta)
    torch.testing.assert_close(logits(adapted.model), logits(merged), atol=1e-5, rtol=1e-4)


def test_deepseek_adapts_routed_experts_and_attention_only() -> None:
    adapted = adapt("deepseek_v3")
    names = {name.rpartition(".")[0] for name in adapted.initial_adapter(seed=0)}
    assert {name for name in names if ".mlp." in name} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    assert adapted.layers == {"model.layers.1.mlp": NUM_EXPERTS}


def test_dense_models_adapt_attention_and_feed_forward_but_not_the_output_embedding() -> None:
    names = adapt("llama").initial_adapter(seed=0)
    projections = {name.split(".")[-2] for name in names}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("family", "router"), [("gpt_oss", "mlp.router"), ("granitemoe", "block_sparse_moe.router")])
def test_the_router_is_found_beside_the_experts(family: str, router: str) -> None:
    assert [layer.router for layer in moe_layers(tiny_model(family)).values()] == [
        f"model.layers.{index}.{router}" for index in range(2)
    ]


@pytest.mark.parametrize(
    ("family", "training"), [(family, training) for family in MOE_FAMILIES for training in TRAININGS[:3]]
)
def test_saved_adapter_gives_the_same_logits_in_stock_peft(
    family: str, training: tuple[ExpertTraining, RouterTraining], tmp_path: Path
) -> None:
    experts, router = training
    adapted = adapt(family, experts=experts, router=router)
    initial, adapter = adapted.initial_adapter(seed=0), random_adapter(adapted)
    adapted.load_adapter(initial)
    adapted.save_peft(adapter, tmp_path)
    torch.testing.assert_close(logits(adapted.model), logits(tiny_model(family)), msg="saving changed the adapter")
    adapted.load_adapter(adapter)
    stock = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(stock), logits(adapted.model), atol=1e-5, rtol=1e-5)
    assert (logits(stock) - logits(tiny_model(family))).abs().max() > 0.1
    assert stock.peft_config["default"].base_model_name_or_path == "/bases/tiny"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_dense_adapter_gives_the_same_logits_in_stock_peft(family: str, tmp_path: Path) -> None:
    adapted = adapt(family)
    adapter = random_adapter(adapted)
    adapted.load_adapter(adapter)
    adapted.save_peft(adapter, tmp_path)
    stock = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(stock), logits(adapted.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", TRAININGS)
def test_initial_adapter_leaves_the_logits_of_the_base(training: tuple[ExpertTraining, RouterTraining]) -> None:
    adapted = adapt("olmoe", experts=training[0], router=training[1])
    adapted.load_adapter(adapted.initial_adapter(seed=3))
    torch.testing.assert_close(logits(adapted.model), logits(adapted.base.model), atol=1e-5, rtol=1e-5)


def test_initial_adapter_is_drawn_from_the_seed_within_its_limits() -> None:
    adapted = adapt("qwen3_moe")
    first, again, other = (adapted.initial_adapter(seed) for seed in (0, 0, 1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        if name.endswith("lora_A"):
            assert 0 < np.abs(array).max() <= array.shape[-1] ** -0.5
            assert not np.array_equal(array, other[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [TRAININGS[1], TRAININGS[2]])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_step_changes_the_whole_adapter_in_float32_and_nothing_of_the_base(
    family: str, training: tuple[ExpertTraining, RouterTraining], dtype: torch.dtype
) -> None:
    adapted = adapt(family, dtype=dtype, experts=training[0], router=training[1])
    adapter = random_adapter(adapted)
    adapted.load_adapter(adapter)
    base = {name: tensor.clone() for name, tensor in adapted.base.model.state_dict().items()}
    parameters = adapted.parameters_by_name()
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    tokens = random_tokens(batch_size=4, length=32)
    adapted.model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    trained = adapted.read_adapter()
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert all(not np.array_equal(trained[name], adapter[name]) for name in adapter)
    trainable = {id(p) for p in adapted.model.parameters() if p.requires_grad}
    assert trainable == {id(parameter) for parameter in parameters.values()}
    for name, tensor in adapted.base.model.state_dict().items():
        torch.testing.assert_close(tensor, base[name], atol=0, rtol=0)
    assert all(p.grad is None and not p.requires_grad for p in adapted.base.model.parameters())


def test_experts_trained_in_full_leave_the_biases_of_the_base() -> None:
    names = adapt("gpt_oss", experts=ExpertTraining.full).initial_adapter(seed=0)
    assert {name.rpartition(".")[2] for name in names if ".experts." in name} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_tokens_are_real_tokens_times_experts_per_token(
    family: str, training: tuple[ExpertTraining, RouterTraining]
) -> None:
    """Two passes: 2 x 7 tokens with 3 padded, then 2 x 7 with none: 25 real tokens, each to 2 experts."""
    adapted = adapt(family, experts=training[0], router=training[1])
    padded = torch.ones(2, 7, dtype=torch.bool)
    padded[1, 4:] = False
    with adapted.count_expert_tokens() as counter:
        for mask in (padded, torch.ones_like(padded)):
            counter.set_mask(mask)
            logits(adapted.model)
    totals = counter.totals()
    layer = next(iter(totals))
    assert totals.keys() == adapted.layers.keys()
    assert all(tokens_E.shape == (NUM_EXPERTS,) and tokens_E.sum() == 25 * TOP_K for tokens_E in totals.values())
    logits(adapted.model)
    assert counter.totals()[layer].sum() == 25 * TOP_K, "counted after the context had ended"


def test_padding_does_not_choose_whose_tokens_are_counted() -> None:
    """Padded on the right, a row's tokens are counted like the row alone."""
    adapted = adapt("olmoe")
    tokens = random_tokens(batch_size=1, length=9)
    with adapted.count_expert_tokens() as alone, torch.no_grad():
        alone.set_mask(torch.ones(1, 5, dtype=torch.bool))
        adapted.model(tokens[:, :5])
    with adapted.count_expert_tokens() as padded, torch.no_grad():
        mask = torch.arange(9)[None] < 5
        padded.set_mask(mask)
        adapted.model(tokens, attention_mask=mask.long())
    for layer, tokens_E in alone.totals().items():
        np.testing.assert_array_equal(tokens_E, padded.totals()[layer])


def test_foreign_adapters_are_refused() -> None:
    adapted = adapt("olmoe")
    adapter = adapted.initial_adapter(seed=0)
    name = next(iter(adapter))
    with pytest.raises(ValueError, match="array names differ"):
        adapted.load_adapter({key: array for key, array in adapter.items() if key != name})
    # NumPy and torch would both broadcast this.
    with pytest.raises(ValueError, match=rf"shapes of {name} differ"):
        adapted.load_adapter({**adapter, name: adapter[name][:1]})


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"experts": ExpertTraining.full}, r"is dense: model.experts=full has no expert"),
        ("llama", {"router": RouterTraining.averaged}, r"no router .* model.router must be frozen, got averaged"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(family: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(family, **settings)


@pytest.mark.parametrize("experts", [ExpertTraining.frozen, ExpertTraining.full])
def test_training_without_any_lora_is_refused(experts: ExpertTraining) -> None:
    with pytest.raises(ValueError, match=r"no weight gets LoRA.*set lora\.attention=true"):
        adapt("olmoe", LoraConfig(attention=False), experts=experts)


def test_experts_of_an_unknown_form_are_refused_unless_frozen() -> None:
    """DBRX joins its experts into plain matrices: there is no parameter with the expert on axis 0."""
    with pytest.raises(ValueError, match=r"would leave every routed expert untrained; set model.experts=frozen"):
        adapt("dbrx")
    assert adapt("dbrx", experts=ExpertTraining.frozen).layers == {}


def test_one_base_is_read_once_and_shared_by_its_adapters(tmp_path: Path) -> None:
    config = save_tiny_base(tmp_path / "base", "olmoe")
    loads = base_model_loads()
    narrow = adapted_model(config, LoraConfig(rank=2), CPU)
    wide = adapted_model(config, LoraConfig(rank=4), CPU)
    assert adapted_model(config, LoraConfig(rank=2), CPU) is narrow
    assert base_model_loads() == loads + 1
    assert narrow.base is wide.base is load_base(config, CPU)
    base = {parameter.data_ptr() for parameter in narrow.base.model.parameters()}
    for adapted in (narrow, wide):
        assert base <= {parameter.data_ptr() for parameter in adapted.model.parameters()}
        adapted.load_adapter(random_adapter(adapted))
    narrow.load_adapter(narrow.initial_adapter(seed=0))
    torch.testing.assert_close(logits(narrow.model), logits(narrow.base.model))
    torch.testing.assert_close(logits(narrow.base.model), logits(tiny_model("olmoe")), msg="the base was changed")


def test_the_base_has_the_dtype_that_is_set(tmp_path: Path) -> None:
    config = save_tiny_base(tmp_path / "base", "llama")
    config.dtype = Precision.bfloat16
    base = load_base(config, CPU)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.tokenizer.pad_token_id is not None
