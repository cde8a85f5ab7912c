"""What a template model yields, in the denoiser: against attention by hand, and LoRAs that diffusers loads."""

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_pipe.contracts import Batch, ComponentFiles, load_family
from diffsynth_pipe.errors import DataError, ModelError
from diffsynth_pipe.families.flux2 import put_kv_cache
from diffsynth_pipe.modeling import templates
from diffsynth_pipe.training.lora import linear_layers, target_layers
from diffsynth_pipe.training.templates import HotLora, stack_kv_caches

CPU = torch.device("cpu")
HEADS, CHANNELS = 4, 32


@pytest.fixture
def load_dit(template_repositories):
    def load(family):
        folder = template_repositories / family / "transformer"
        files = ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder)
        return load_family(family).components["dit"].load(files, torch.float32, CPU)

    return load


def predict(family, dit, num_samples=2):
    """Return the velocity of samples whose fields are noise."""
    draw = torch.Generator().manual_seed(1)
    channels, size = {"flux2": (128, 96), "z_image": (16, 64)}[family]
    latents = torch.randn(2, channels, 4, 6, generator=draw)[:num_samples]
    text = torch.randn(2, 9, size, generator=draw)[:num_samples]
    batch = Batch(
        fields={"prompt_emb": text},
        lengths={"prompt_emb": torch.tensor([9, 7])[:num_samples]},
        sample_ids=("a", "b")[:num_samples],
        visits=(0,) * num_samples,
    )
    sigma = torch.tensor([0.3, 0.8])[:num_samples]
    with torch.no_grad():
        return load_family(family).predict_velocity({"dit": dit}, batch, latents, sigma)


def random_kv(seed, tokens, num_samples=1):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_samples, tokens, HEADS, CHANNELS, generator=draw) for _ in range(2))


def attend(query, key, value):
    """Softmax attention by its formula; all are [batch, token, head, channel]."""
    weights = (query.permute(0, 2, 1, 3) @ key.permute(0, 2, 3, 1) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).flatten(2)


def rms(states, weight, eps):
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_a_double_block_attends_to_keys_and_values_made_by_hand(load_dit):
    dit = load_dit("flux2")
    attention = dit.transformer_blocks[0].attn
    draw = torch.Generator().manual_seed(2)
    image, text = (torch.randn(1, tokens, 128, generator=draw) for tokens in (6, 5))
    more = random_kv(3, tokens=4)
    put_kv_cache(dit, {"double_0": more})
    with torch.no_grad():
        found_image, found_text = attention(image, text)
        heads = [
            torch.cat([text @ added.weight.T, image @ own.weight.T], dim=1).unflatten(-1, (HEADS, CHANNELS))
            for added, own in (
                (attention.add_q_proj, attention.to_q),
                (attention.add_k_proj, attention.to_k),
                (attention.add_v_proj, attention.to_v),
            )
        ]
        norms = ((attention.norm_added_q, attention.norm_q), (attention.norm_added_k, attention.norm_k))
        query, key = (
            torch.cat([rms(part[:, :5], a.weight, a.eps), rms(part[:, 5:], b.weight, b.eps)], dim=1)
            for part, (a, b) in zip(heads[:2], norms, strict=True)
        )
        out = attend(query, torch.cat([key, more[0]], dim=1), torch.cat([heads[2], more[1]], dim=1))
    torch.testing.assert_close(found_text, out[:, :5] @ attention.to_add_out.weight.T)
    torch.testing.assert_close(found_image, out[:, 5:] @ attention.to_out[0].weight.T)


def test_no_keys_and_empty_ones_change_nothing_and_the_last_batchs_are_gone(load_dit):
    dit = load_dit("flux2")
    plain = predict("flux2", dit)
    blocks = ("double_0", "single_0", "single_1")
    put_kv_cache(dit, {name: random_kv(0, tokens=3, num_samples=2) for name in blocks})
    assert not torch.allclose(predict("flux2", dit), plain, atol=1e-3)
    put_kv_cache(dit, {})
    assert torch.equal(predict("flux2", dit), plain)
    put_kv_cache(dit, {name: random_kv(0, tokens=0, num_samples=2) for name in blocks})
    torch.testing.assert_close(predict("flux2", dit), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"double_1": random_kv(0, 3)}, "kv_cache names 'double_1'; blocks are double_0, single_0, single_1"),
        (
            {"single_1": (torch.zeros(1, 3, 2, 64),) * 2},
            r"keys and values of single_1 have shapes .* \(1, tokens, 4",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(load_dit, cache, message):
    with pytest.raises(ModelError, match=f"^template_model_id_or_path: {message}"):
        put_kv_cache(load_dit("flux2"), cache)


def test_samples_with_other_numbers_of_keys_are_refused():
    one, other = {"double_0": random_kv(0, 3)}, {"double_0": random_kv(0, 4)}
    assert stack_kv_caches([one, one])["double_0"][0].shape == (2, 3, HEADS, CHANNELS)
    for caches in ([one, other], [one, {}], [{}, one]):
        with pytest.raises(ModelError, match=r"set batch_size to 1$"):
            stack_kv_caches(caches)


def random_lora(family, dit, rank, seed):
    """Return matrices for all layers that the family's LoRAs have."""
    draw, layers = torch.Generator().manual_seed(seed), linear_layers(dit)
    lora = {}
    for name in target_layers(dit, load_family(family).lora_target_modules):
        lora[f"{name}.lora_A.weight"] = torch.randn(rank, layers[name].in_features, generator=draw) / 10
        lora[f"{name}.lora_B.weight"] = torch.randn(layers[name].out_features, rank, generator=draw) / 10
    return lora


@pytest.mark.parametrize("family", ["flux2", "z_image"])
def test_hot_loaded_matrices_act_as_those_that_diffusers_loads(load_dit, family, tmp_path):
    dit, loaded = load_dit(family), load_dit(family)
    lora = random_lora(family, dit, rank=3, seed=5)
    save_file({f"transformer.{name}": tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    loaded.load_lora_adapter(tmp_path / "lora.safetensors", use_safetensors=True, prefix="transformer")
    hot, plain = HotLora(dit), predict(family, dit)
    hot.put([lora])
    expected = predict(family, loaded)
    torch.testing.assert_close(predict(family, dit), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-2)
    hot.put([])
    assert torch.equal(predict(family, dit), plain)


def test_each_sample_of_a_batch_has_its_own_lora(load_dit):
    dit = load_dit("flux2")
    hot = HotLora(dit)
    loras = [random_lora("flux2", dit, rank, seed=rank) for rank in (3, 2)]
    alone = []
    for lora in loras:
        hot.put([lora])
        alone.append(predict("flux2", dit))
    hot.put(loras)
    expected = torch.stack([alone[0][0], alone[1][1]])
    torch.testing.assert_close(predict("flux2", dit), expected, rtol=0, atol=1e-5)
    hot.put([{}, loras[1]])
    mixed = predict("flux2", dit)
    torch.testing.assert_close(mixed[1], alone[1][1], rtol=0, atol=1e-5)
    hot.put([])
    torch.testing.assert_close(mixed[0], predict("flux2", dit)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"nowhere.lora_A.weight": torch.zeros(2, 8)}, "a LoRA with 'nowhere.lora_A.weight', which is of no linear"),
        ({"x_embedder.lora_A.weight": torch.zeros(2, 128)}, r"a LoRA for 'x_embedder' with shapes \{'A': \(2, 128\)\}"),
        (
            {"x_embedder.lora_A.weight": torch.zeros(2, 64), "x_embedder.lora_B.weight": torch.zeros(128, 2)},
            r"a LoRA for 'x_embedder' with shapes .*, but the layer takes A \(rank, 128\) and B \(128, rank\)",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(load_dit, lora, message):
    with pytest.raises(ModelError, match=f"^template_model_id_or_path: the model yields {message}"):
        HotLora(load_dit("flux2")).put([lora])


def test_layers_that_see_all_samples_as_one_sequence_take_no_lora_of_one_sample(load_dit):
    dit = load_dit("z_image")
    hot, name = HotLora(dit), "cap_embedder.1"
    loras = [
        {f"{name}.lora_A.weight": torch.ones(1, 64) * scale, f"{name}.lora_B.weight": torch.ones(128, 1)}
        for scale in (1, 2)
    ]
    hot.put(loras)
    with pytest.raises(ModelError, match=r"sees the tokens of all samples as one sequence; set batch_size to 1$"):
        predict("z_image", dit)
    hot.put(loras[:1])
    predict("z_image", dit)


def write_template(folder, code):
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(code)
    return ComponentFiles(weights=(), folder=folder, code=(folder / "model.py",))


CODE = """
import torch

class Numbers(torch.nn.Module):
    def __init__(self, size=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size))

    def process_inputs(self, pipe, number, **kwargs):
        {process}

    def forward(self, value, **kwargs):
        return {{"lora": {{}}}}

TEMPLATE_MODEL = Numbers
{more}
"""


def test_weights_are_those_that_the_code_names_or_the_same_each_time(tmp_path):
    files = write_template(tmp_path, CODE.format(process="return {}", more=""))
    drawn = [templates.load_template(files, torch.float32, CPU).model.weight for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.randn(2))
    assert torch.equal(*drawn)
    more = 'TEMPLATE_MODEL_CONFIG = {"size": 3}\nTEMPLATE_MODEL_PATH = "weights.safetensors"'
    files = write_template(tmp_path, CODE.format(process="return {}", more=more))
    save_file({"weight": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    assert templates.load_template(files, torch.float32, CPU).model.weight.tolist() == [0, 1, 2]
    save_file({"pipe.template_model.weight": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    assert templates.load_template(files, torch.float32, CPU).model.weight.tolist() == [0, 1, 2]
    save_file({"bias": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"model.py: Error.* Missing key.*; name the weights of this model$"):
        templates.load_template(files, torch.float32, CPU)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its weights .*weights.safetensors cannot be read \(.*\); copy them again$"):
        templates.load_template(files, torch.float32, CPU)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import absent_package", r"imports what is not here \(No module named 'absent_package'\); install it"),
        ("A = 1", "defines no TEMPLATE_MODEL; name its class so"),
        ("TEMPLATE_MODEL = dict", "TEMPLATE_MODEL must be a torch module with a method process_inputs"),
    ],
)
def test_code_that_is_no_template_model_is_refused(tmp_path, code, message):
    with pytest.raises(ModelError, match=f"^template_model_id_or_path: .*model.py:? {message}"):
        templates.load_template(write_template(tmp_path, code), torch.float32, CPU)


def encode(folder, process, inputs):
    template = templates.load_template(
        write_template(folder, CODE.format(process=process, more="")), torch.bfloat16, CPU
    )
    values = {"template_inputs": templates.parse_template_inputs(inputs)}
    return templates.encode_template_inputs({"template_processor": template}, values)["template_inputs"]


def test_what_is_prepared_comes_back_as_it_was(tmp_path):
    process = (
        'return {"value": {"tensor": torch.full((2, 3), number, dtype=pipe.torch_dtype), "more": '
        '[torch.tensor([5]), "text", None, True, 0.1]}, "has_vae": hasattr(pipe, "vae")}'
    )
    stored = encode(tmp_path, process, '{"number": 0.3}')
    assert stored.dtype == torch.uint8
    assert stored.shape[1] == 1
    assert torch.equal(stored, encode(tmp_path, process, {"number": 0.3}))
    values = templates.unpack(stored.numpy().tobytes(), CPU, torch.float32)
    assert torch.equal(values["value"]["tensor"], torch.full((2, 3), 0.3, dtype=torch.bfloat16).float())
    number, *rest = values["value"]["more"]
    assert (number.dtype, number.tolist(), rest) == (torch.int64, [5], ["text", None, True, 0.1])
    assert values["has_vae"] is False


@pytest.mark.parametrize(
    ("process", "error", "message"),
    [
        ("return {'value': object()}", DataError, "process_inputs returned a object, which cannot be stored"),
        ("return {'value': torch.tensor(float('nan'))}", DataError, "process_inputs returned a NaN or Inf"),
        ("return {'value': float('inf')}", DataError, "process_inputs returned a NaN or Inf"),
        ("return {'value': {0: 1}}", DataError, "process_inputs returned a dict, which cannot be stored"),
        ("return {'value': {}['scale']}", DataError, r"does not take the cell \(KeyError: 'scale'\); correct it"),
        ("open('/nowhere')", DataError, r"\[Errno 2\] No such file.*; name files as from the working directory"),
        ("pipe.vae", ModelError, "asks for pipe.vae, but only pipe.device and pipe.torch_dtype are there"),
    ],
)
def test_inputs_that_cannot_be_prepared_are_refused(tmp_path, process, error, message):
    with pytest.raises(error, match=message):
        encode(tmp_path, process, {"number": 1})


@pytest.mark.parametrize("cell", ["0.8", "[1]", "{", 3, None])
def test_a_cell_is_an_object(cell):
    with pytest.raises(ValueError, match="a JSON object"):
        templates.parse_template_inputs(cell)


def test_a_models_output_must_be_known(tmp_path):
    code = CODE.format(process="return {'value': 1}", more="").replace('{"lora": {}}', '{"residual": 1}')
    template = templates.load_template(write_template(tmp_path, code), torch.float32, CPU)
    with pytest.raises(ModelError, match="the model yields residual, but this family takes a dict of lora alone"):
        template.outputs(templates.pack({"value": 1}), CPU)
