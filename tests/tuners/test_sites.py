"""Sites: the committed table of all model types, and proofs by forward passes that use none of the finder's names."""

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from bem_peft import CompositeConfig, KroneckerConfig, ResidualFiLMConfig
from bem_peft.sites.find import (
    ATTENTION_OUTPUT,
    MLP_DOWN,
    ModelBuildError,
    SiteError,
    SiteTable,
    build_meta,
    find_sites,
    site_table_row,
)
from bem_peft.sites.models import language_model_types
from bem_peft.sites.table import merged_table, plain
from bem_peft_cli.main import main
from tests.tiny_models import build, llama

TABLE = json.loads(Path(__file__).with_name("sites_table.json").read_text())
INSTALLED = language_model_types()
NEWEST_IN_TABLE = "5.24.0"
# peft 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
NEVER = re.compile(
    r"router|(^|\.)(gate|gate_proj|up_proj|[qkv]_proj|q|k|v|query|key|lm_head|embed_tokens|wte|fc1|c_fc|c_attn|in_proj)(\.|$)"
    r"|norm$|vision|visual|audio|image|projector|conv1d|_a_proj|kv_b_proj|lora|altup|laurel|indexer|base_layer|score|classifier"
)

# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", INSTALLED)
def test_sites_of_the_installed_version(model_type: str) -> None:
    """A type of the table has one of its rows; any other that builds is placed, or its error names what is not.

    The session's summary lists the types that are new to the table and those that the installed version lacks.
    """
    try:
        row = site_table_row(find_sites(build_meta(model_type)))
    except (SiteError, ModelBuildError) as error:
        row = {"error": str(error)}
    if "error" in row:
        assert repr(model_type) in row["error"] or "`target_modules`" in row["error"]
    if model_type not in TABLE:
        assert "error" in row or row[ATTENTION_OUTPUT] or row[MLP_DOWN]
        return
    known = [plain(variant) for variant in TABLE[model_type]]
    if any("requires the PIL library" in v.get("error", "") for v in TABLE[model_type]) or model_type == "gemma3n":
        return  # built or not by what else is installed
    assert plain(row) in known, "a new row: `bem-peft sites --all --write tests/tuners/sites_table.json`, and read it"


def test_table_holds_every_type_of_each_version_in_it() -> None:
    versions = {version for rows in TABLE.values() for row in rows for version in row["transformers"]}
    if transformers.__version__ in versions:
        have = [t for t, rows in TABLE.items() if any(transformers.__version__ in row["transformers"] for row in rows)]
        assert have == INSTALLED
    for name, rows in TABLE.items():
        seen = [version for row in rows for version in row["transformers"]]
        assert len(seen) == len(set(seen)), f"{name}: two rows for one version"


def test_no_site_of_the_table_is_an_input_a_router_or_another_modality() -> None:
    rows = [row for variants in TABLE.values() for row in variants]
    names = [n for row in rows for role in (ATTENTION_OUTPUT, MLP_DOWN) for n in row.get(role, ())]
    assert len(names) > 500
    assert not [name for name in names if NEVER.search(name)]


def test_only_types_without_projections_lack_sites() -> None:
    """In the newest version of the table; older ones build fewer types from their default config."""
    newest = {t: row for t, rows in TABLE.items() for row in rows if NEWEST_IN_TABLE in row["transformers"]}
    assert len(newest) == 223
    unplaced = {t for t, row in newest.items() if "error" in row and "cannot be built" not in row["error"]}
    assert unplaced == {"xlnet"}  # W_O is a bare 3-D parameter there
    assert sum("error" in row for row in newest.values()) <= 6


# -- proofs by forward passes ----------------------------------------------------------------------------------------

# Heads 4 x 16 = 64 = d; MLP width 96. A type reads the names it knows.
TINY = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 56,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "d_kv": 16,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
MLA = {
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
FAMILIES: dict[str, dict[str, object]] = {
    "bart": {},
    "bert": {"is_decoder": True},
    "bloom": {},
    "cohere": {},
    "deepseek_v3": MLA | {"num_hidden_layers": 4, "n_group": 1, "topk_group": 1},
    "falcon": {"head_dim": None},
    "falcon_h1": {},
    "gemma2": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "granitemoehybrid": {},
    "jamba": {"num_hidden_layers": 6, "use_mamba_kernels": False},
    "lfm3": {},
    "llama": {"num_key_value_heads": 2},
    "longt5": {},
    "mamba": {},
    "mamba2": {"num_heads": 8},
    "mixtral": {},
    "mpt": {},
    "olmo2": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "qwen2_moe": {},
    "qwen3_next": DELTA | {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64},
    "starcoder2": {},
    "switch_transformers": {},
    "t5": {},
    "xlstm": {},
}
# of these the types that the installed version builds; the summary names what it lacks
BUILT = sorted(
    name for name in FAMILIES
    if name in INSTALLED and not any("error" in r for r in TABLE[name] if transformers.__version__ in r["transformers"])
)  # fmt: skip
NORMS_BETWEEN = {"bart", "bert", "rwkv"}  # blocks that norm the residual stream itself
VALUE = 0.37


def tiny_model(model_type: str) -> nn.Module:
    """A model of 2 to 6 blocks with random weights, in evaluation mode."""
    fields = {name: value for name, value in {**TINY, **FAMILIES[model_type]}.items() if value is not None}
    auto_class = AutoModelForCausalLM
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        auto_class = AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def block_inputs_and_outputs(model: nn.Module, table: SiteTable) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Block name -> hidden states before and after it, in one forward pass."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(name: str):
        def hook(_module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(name, (hidden.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
        for name in {site.block for site in table.sites}
    ]
    ids = torch.randint(3, 150, (1, 7), generator=torch.Generator().manual_seed(0))
    is_seq2seq = type(model).__name__.endswith(("ConditionalGeneration",))
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if is_seq2seq else {}))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("model_type", BUILT)
def test_blocks_without_their_sites_are_the_identity_and_each_site_writes_into_the_residual(model_type: str) -> None:
    """With every site silenced a block must return its input; any missed W_O, W_down or fused expert would show."""
    model = tiny_model(model_type)
    table = find_sites(model)
    speaking: set[str] = set()

    def silence(name: str):
        return lambda _module, _args, output: torch.full_like(output, VALUE if name in speaking else 0.0)

    for site in table.sites:
        model.get_submodule(site.name).register_forward_hook(silence(site.name))
    for name in table.fused_experts:
        experts = model.get_submodule(name.rpartition(".")[0])
        for own, parameter in experts.named_parameters(recurse=False):
            if own == name.rpartition(".")[2] or "bias" in own:
                parameter.data.zero_()
    if model_type in NORMS_BETWEEN:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda _module, args, _output: args[0])
    states = block_inputs_and_outputs(model, table)
    assert len(states) == table.blocks
    for name, (before, after) in states.items():
        torch.testing.assert_close(
            after, before, msg=lambda text, name=name: f"{name} writes besides its sites: {text}"
        )
    routed = [site for site in table.sites if site.mixer == "expert"]
    for site in table.sites:
        if site in routed and site not in routed[:1]:
            continue  # a routed expert speaks only where tokens are sent to it; one unit of them is looked at below
        speaking = {s.name for s in routed} if site in routed else {site.name}
        before, after = block_inputs_and_outputs(model, table)[site.block]
        assert not torch.equal(before, after), f"{site.name} does not reach the output of {site.block}"


@pytest.mark.parametrize("model_type", BUILT)
def test_attention_output_reads_heads_times_head_dim(model_type: str) -> None:
    model = tiny_model(model_type)
    heads = TINY["num_attention_heads"]
    head_dim = {"deepseek_v3": 24}.get(model_type, 16)
    for site in find_sites(model).sites:
        if site.mixer in ("attention", "cross_attention"):
            assert site.num_heads == heads
            assert site.in_features == heads * head_dim
        elif site.role == MLP_DOWN:
            assert site.num_heads is None
            assert site.in_features in {"xlstm": (192,)}.get(model_type, (40, 48, 56, 96, 4 * 64))


# -- other models than language models of transformers ---------------------------------------------------------------


def tiny_llama(**fields: object) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **fields}))


def test_headless_and_classification_models_have_the_sites_of_the_language_model() -> None:
    names = find_sites(tiny_llama()).names()
    config = AutoConfig.for_model("llama", **TINY)
    assert [f"model.{name}" for name in find_sites(transformers.LlamaModel(config)).names()] == names
    assert find_sites(AutoModelForSequenceClassification.from_config(config)).names() == names


@pytest.mark.parametrize(
    "config",
    [
        lambda: KroneckerConfig(u_rank=2, v_rank=2),
        lambda: CompositeConfig([KroneckerConfig(u_rank=2, v_rank=2), ResidualFiLMConfig(gamma_dim=2, beta_dim=2)]),
    ],
)
def test_a_config_that_was_used_finds_the_sites_of_the_next_model(config: Callable[[], PeftConfig]) -> None:
    """A deeper one has more blocks; another family has other names. What the user named stays named."""
    used = config()
    for model in (llama(num_hidden_layers=1), llama(num_hidden_layers=3), build("gpt2")):
        adapted, alone = get_peft_model(copy.deepcopy(model), used), get_peft_model(model, config())
        assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in alone.named_parameters()]
    named = KroneckerConfig(u_rank=2, v_rank=2, target_modules=["model.layers.0.mlp.down_proj"])
    for blocks in (1, 3):
        model = get_peft_model(llama(num_hidden_layers=blocks), named)
        assert model.targeted_module_names == ["model.layers.0.mlp.down_proj"]
    used = KroneckerConfig(u_rank=2, v_rank=2)
    get_peft_model(llama(num_hidden_layers=2), used)
    used.target_modules.discard("model.layers.1.mlp.down_proj")
    assert get_peft_model(llama(num_hidden_layers=2), used).targeted_module_names == ["model.layers.0.mlp.down_proj"]


def test_role_selects_names() -> None:
    table = find_sites(tiny_llama())
    assert table.names(ATTENTION_OUTPUT) == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert table.names(MLP_DOWN) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert table.names() == table.names(ATTENTION_OUTPUT, MLP_DOWN)


@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings", "ignore:The following .*_pattern keys", "ignore:fan_in_fan_out"
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "mixtral"])
def test_adapters_do_not_change_the_sites(model_type: str) -> None:
    model = tiny_model(model_type)
    before = find_sites(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=before.names() or None, r=2, modules_to_save=["lm_head"]))
    adapted.add_adapter("second", LoraConfig(target_modules="all-linear", r=2))
    assert find_sites(model) == before
    after = find_sites(adapted)
    assert after.names() == [f"base_model.model.{name}" for name in before.names()]
    assert not any("base_layer" in name for name in (*after.names(), *after.fused_experts))


def test_adapted_fused_experts_keep_their_names() -> None:
    model = tiny_model("gpt_oss")
    before = find_sites(model).fused_experts
    get_peft_model(model, LoraConfig(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"], r=2))
    assert find_sites(model).fused_experts == before


def test_leaf_with_in_and_out_features_is_a_projection() -> None:
    class QuantisedLinear(nn.Module):
        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.register_buffer("packed", torch.zeros(out_features, in_features // 8, dtype=torch.int32))

    model = tiny_llama()
    before = find_sites(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, QuantisedLinear(module.in_features, module.out_features))
    assert find_sites(model) == before


def test_parameter_shared_block_is_found_once() -> None:
    table = find_sites(transformers.AlbertModel(AutoConfig.for_model("albert", **TINY, embedding_size=32)))
    assert table.blocks == 1
    assert [site.role for site in table.sites] == [ATTENTION_OUTPUT, MLP_DOWN]


@pytest.mark.parametrize(("width", "mlp"), [(64, 64), (64, 32), (64, 128), (32, 64)])
def test_equal_widths_are_told_apart(width: int, mlp: int) -> None:
    for model_type in ("llama", "phi3", "gpt2", "bert"):
        sizes = {"hidden_size": width, "n_embd": width, "intermediate_size": mlp, "n_inner": mlp}
        config = AutoConfig.for_model(model_type, **{**TINY, **sizes, "head_dim": width // 4, "is_decoder": True})
        ends = {name.split(".")[-1] for name in find_sites(AutoModelForCausalLM.from_config(config)).names()}
        assert ends <= {"o_proj", "down_proj", "c_proj", "dense"}
        downs = find_sites(AutoModelForCausalLM.from_config(config)).names(MLP_DOWN)
        assert len(downs) == 2
        assert not any("intermediate" in name for name in downs)


def test_gpt2_cross_attention_is_a_mixer_of_its_own() -> None:
    config = AutoConfig.for_model("gpt2", **TINY, add_cross_attention=True, is_decoder=True)
    mixers = [site.mixer for site in find_sites(AutoModelForCausalLM.from_config(config)).sites]
    assert mixers == ["attention", "cross_attention", "mlp"] * 2 or sorted(mixers[:3]) == [
        "attention", "cross_attention", "mlp"
    ]  # fmt: skip


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl", "llava", "blip-2", "whisper", "git"])
def test_towers_of_other_modalities_hold_no_site(model_type: str) -> None:
    names = find_sites(build_meta(model_type)).names()
    assert names
    assert not [n for n in names if re.search(r"vision|visual|audio|image|projector|qformer|model\.encoder", n)]


def test_a_32_layer_model_takes_well_under_a_second() -> None:
    model = build_meta("llama")
    start = time.perf_counter()
    assert len(find_sites(model).sites) == 64
    assert time.perf_counter() - start < 1.0


# -- errors ----------------------------------------------------------------------------------------------------------


def test_model_without_blocks_raises() -> None:
    with pytest.raises(SiteError, match=r"no site in 0 blocks.*target_modules"):
        find_sites(nn.Sequential(nn.Linear(4, 4)))


def test_attention_without_output_projection_is_named() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Identity()
    with pytest.raises(SiteError, match=r"model\.layers\.\* \(LlamaDecoderLayer\) has a mixer in self_attn.*2 of 2"):
        find_sites(model)


def test_mlp_without_down_projection_is_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(SiteError, match=r"has no W_down among mlp\.gate_proj \(64 -> 96\).*1 of 2"):
        find_sites(model)


def test_two_possible_output_projections_are_named() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.out_proj = nn.Linear(64, 64)
    with pytest.raises(SiteError, match=r"several, self_attn\.o_proj"):
        find_sites(model)


def test_unknown_module_that_writes_into_the_residual_is_named() -> None:
    model = tiny_llama()
    model.model.layers[0].memory = nn.Sequential(nn.Linear(64, 20), nn.SiLU(), nn.Linear(30, 64))
    with pytest.raises(SiteError, match=r"no mixer and no MLP: memory\.\* \(30 -> 64\)"):
        find_sites(model)


# -- command line ----------------------------------------------------------------------------------------------------


def test_command_prints_the_sites_of_a_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "gpt_oss"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    output = "attention_output model.layers.*.self_attn.o_proj attention 4096 -> 2880 64 36"
    assert output.split() in lines
    experts = "model.layers.*.mlp.experts (down_proj) 128 experts, 4 a token 2880 -> 2880 - 36"
    assert f"mlp_down {experts}".split() in lines
    assert "72 sites in 36 blocks" in out


def test_command_says_what_is_no_site(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "dbrx"]) == 0
    out = capsys.readouterr().out
    assert (
        "no site: transformer.blocks.*.ffn.experts.mlp.w2 (x24), W_down of all experts: all experts stand side" in out
    )


def test_command_reads_the_config_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    assert main(["sites", str(tmp_path)]) == 0
    assert "4 sites in 2 blocks" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["no_such_type", "/no/such/folder", "xlnet"])
def test_command_explains_what_it_cannot_place(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", model]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bem-peft: ")


def test_command_rejects_a_model_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sites", "llama", "--all"])


def test_command_writes_the_table_and_keeps_reviews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bem_peft.sites.find.language_model_types", lambda: ["gpt2", "opt"])
    path, version = tmp_path / "table.json", transformers.__version__
    assert main(["sites", "--all", "--write", str(path)]) == 0
    table = json.loads(path.read_text())
    table["gpt2"][0] |= {"reviewed": True, "transformers": ["1.0.0", version]}
    table["opt"][0] |= {"reviewed": True, "blocks": 11}
    table["gone"] = [{"transformers": ["1.0.0"], "error": "as it was"}]
    path.write_text(json.dumps(table))
    capsys.readouterr()
    assert main(["sites", "--all", "--write", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["gpt2"] == table["gpt2"]
    assert "reviewed" not in written["opt"][0]
    assert [plain(row) for row in written["opt"]] == [site_table_row(find_sites(build_meta("opt")))]
    assert written["gone"] == table["gone"]
    out = capsys.readouterr().out
    assert f"wrote 2 model types of transformers {version}" in out
    assert "new: -\ngone: gone\nchanged: opt\n" in out


def test_a_row_of_another_version_is_kept_beside_the_new_one() -> None:
    before = {"a": [{"transformers": ["1.0", "2.0"], "reviewed": True, "blocks": 1}]}
    table, changes = merged_table(before, {"a": {"blocks": 2}, "b": {"blocks": 3}}, "2.0")
    assert table["a"] == [
        {"transformers": ["1.0"], "reviewed": True, "blocks": 1},
        {"transformers": ["2.0"], "blocks": 2},
    ]
    assert changes == {"new": ["b"], "gone": [], "changed": ["a"]}
    again, changes = merged_table(table, {"a": {"blocks": 1}, "b": {"blocks": 3}}, "10.0")
    assert again["a"][0]["transformers"] == ["1.0", "10.0"]
    assert changes == {"new": [], "gone": [], "changed": []}


def test_weights_of_all_experts_in_a_leaf_are_no_projection() -> None:
    """As Aria's `fc2` until transformers 5.22: in_features and out_features, and a 3-D weight."""

    class GroupedExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 96, 64
            self.weight = nn.Parameter(torch.zeros(4, 96, 64))

    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.experts = nn.Module()
        layer.mlp.experts.fc2 = GroupedExperts()
    table = find_sites(model)
    assert table.names() == find_sites(tiny_llama()).names()
    assert table.fused_experts == tuple(f"model.layers.{i}.mlp.experts.fc2.weight" for i in range(2))
