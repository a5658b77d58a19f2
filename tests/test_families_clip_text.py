"""CLIP's tokenizer as OpenAI has it, and prompts of any length, clip skip and namings in the encoder."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests import models
from trainer.errors import UserError
from trainer.families import sd15
from trainer.families.clip_text import ClipTextEncoder, canonical, load_tokenizer

CONFIGS = Path(__file__).parent.parent / "trainer" / "families" / "configs"


@pytest.fixture(scope="module")
def encoder():
    return ClipTextEncoder(models.sd15_parts()[2].eval(), models.byte_tokenizer()).eval()


def test_the_bundled_tokenizer_gives_openais_tokens():
    tokenizer = load_tokenizer(None)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello   WORLD!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 49407


def test_a_folder_of_a_tokenizer_with_the_old_files_is_read(tmp_path):
    tokenizer = load_tokenizer(None)
    merges = gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode()
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    prompt = "An emoji of a Red-Haired superhero's 2 cats, naïve ☃"
    assert load_tokenizer(tmp_path)(prompt).input_ids == tokenizer(prompt).input_ids


def test_a_tokenizer_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="has no CLIP tokenizer: it needs tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_a_short_prompt_is_one_chunk_of_77_with_start_and_end(encoder):
    (chunk,) = encoder.chunks("abc")
    assert len(chunk) == 77 and chunk[0] == 512 and chunk[4:] == [513] * 73
    assert encoder.chunks("") == [[512, *[513] * 76]]


def test_a_long_prompt_loses_no_token(encoder):
    prompt = "".join(chr(ord("a") + i % 26) for i in range(190))
    chunks = encoder.chunks(prompt)
    tokens = encoder.tokenizer(prompt, add_special_tokens=False).input_ids
    assert [len(chunk) for chunk in chunks] == [77] * 3
    assert [*chunks[0][1:76], *chunks[1][1:76], *chunks[2][1:41]] == tokens


def test_a_prompt_of_one_chunk_is_what_the_model_itself_gives(encoder):
    states = encoder(["abc"])
    assert torch.equal(states, encoder.model(torch.tensor(encoder.chunks("abc"))).last_hidden_state)


def test_chunks_are_encoded_alone_and_joined(encoder):
    prompt = "a" * 75 + "b" * 20
    joined = encoder([prompt])
    assert joined.shape == (1, 154, models.TEXT_WIDTH)
    apart = [encoder.model(torch.tensor([chunk])).last_hidden_state for chunk in encoder.chunks(prompt)]
    torch.testing.assert_close(joined, torch.cat(apart, dim=1))


def test_prompts_of_one_call_are_filled_up_with_the_empty_prompt(encoder):
    together = encoder(["abc", "d" * 100])
    torch.testing.assert_close(together[:1], torch.cat([encoder(["abc"]), encoder([""])], dim=1))
    torch.testing.assert_close(together[1:], encoder(["d" * 100]))


def test_the_chunks_of_a_prompt_are_counted(encoder):
    assert [sd15.prompt_chunks(encoder, prompt) for prompt in ("", "a" * 75, "a" * 76)] == [1, 1, 2]
    embeds = sd15.encode_prompts(encoder, ["a" * 76])["prompt_embeds"]
    assert embeds.shape[1] == 77 * 2


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm():
    model = models.sd15_parts()[2].eval()
    second = ClipTextEncoder(model, models.byte_tokenizer(), clip_skip=2)
    ids = torch.tensor(second.chunks("abc"))
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert torch.equal(second(["abc"]), second.body.final_layer_norm(hidden[2]))


def test_the_models_dtype_is_kept(encoder):
    half = ClipTextEncoder(models.sd15_parts()[2].to(torch.bfloat16).eval(), models.byte_tokenizer())
    assert half(["abc"]).dtype == torch.bfloat16 and encoder(["abc"]).dtype == torch.float32


def test_gradients_reach_a_trained_encoder(encoder):
    weight = encoder.body.encoder.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(encoder(["abc"]).square().sum(), weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"])
def test_both_namings_of_clip_mean_the_same(name):
    assert canonical(name) == "text_model.encoder.layers.0.mlp.fc1"
