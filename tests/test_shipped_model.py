"""The trained model that ships: real input with real probabilities, through everything a user does with a model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import twinweight
from tests.engines.test_hf import Fixed
from twinweight.demo import PROMPTS
from twinweight.quality import compare

MODEL = Path(__file__).parents[1] / "models" / "stdlib-15m"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return twinweight.load(MODEL, mode="hard", device="cpu", crossovers=Fixed(torch.bfloat16), progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_twins_change_neither_perplexity_nor_greedy_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    result = compare(model, tokenizer, text, PROMPTS, ppl_tokens=2048, tokens=32)
    for arm in ("twin", "mixed"):
        assert result[f"ppl_{arm}"] == pytest.approx(result["ppl_int4"], rel=1e-3)
    assert result["greedy_equal"], result["different"]
    assert result["ppl_int4"] < 100  # it has learned something: 4096 would be nothing


def test_the_chat_template_and_streaming_work(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": "import os"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("<|assistant|>\n")
    out = model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).strip()


def test_a_padded_batch_gives_what_single_prompts_give(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    prompts = list(PROMPTS[:2])
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    out = model.generate(
        **{k: v for k, v in batch.items() if k != "token_type_ids"}, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert out.shape == (2, batch["input_ids"].shape[1] + 4)
    assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
