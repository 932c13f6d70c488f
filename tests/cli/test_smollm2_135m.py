"""The configurations for SmolLM2-135M: on question-and-answer records, with a tiny decoder."""

import json

import pytest
from tiny import VOCAB

from smol.checkpoints.huggingface import export_decoder
from smol.cli import main
from smol.data.chat import ChatTemplate
from smol.data.tokenizer import load_tokenizer
from smol.paths import project_root
from smol.runs import decoder_folder, tokenizer_of

FOLDER = project_root() / "configs/smollm2_135m"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
}


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


@pytest.fixture(scope="module")
def template(sources):
    source = (FOLDER / "chat_template.jinja").read_text()
    return ChatTemplate(load_tokenizer(sources / "tokenizer"), source)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_template_is_plain_chatml_and_trains_on_answers(template, system):
    asked = [("user", "the cat"), ("assistant", "a dog"), ("user", "why"), ("assistant", "so")]
    turns = asked if system is None else [("system", system), *asked]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = chatml(("system", system or SYSTEM), *asked)
    assert template.render(messages) == expected
    prompt = template.render(messages[:-1], add_generation_prompt=True)
    assert prompt == expected.removesuffix("so<|im_end|>\n")
    found = template.encode(messages)
    trained = template.tokenizer.decode(found.tokens[found.trained])
    assert trained == "a dog<|im_end|>so<|im_end|>"


def test_fine_tuning_and_preference_run_and_open_in_transformers(sources, tmp_path, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [
        {"question": f"the cat saw {i}", "answer": "one", "chosen": "one", "rejected": "a dog"}
        for i in range(40)
    ]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--runs_dir", str(tmp_path), "--vars.train", str(train), "--vars.held_out", "0.2"]
    words += ["--vars.tokenizer", str(sources / "tokenizer"), "--trainer.max_steps", "2"]
    words += ["--data.cache_dir", str(tmp_path / "cache")]
    words += [w for key, n in SHAPE.items() for w in (f"--model.decoder.{key}", str(n))]
    sft = ["--config", str(FOLDER / "sft.yaml"), "--init_from", "null"]
    cli = main(["fit", *sft, *words])
    assert "questions" in cli.trainer.datamodule.source_names
    preference = ["--config", str(FOLDER / "preference.yaml")]
    preference += ["--model.reference_cache", str(tmp_path / "reference")]
    cli = main(["fit", *preference, *words])
    assert "takes its weights from" in caplog.text
    assert cli.trainer.global_step == 2

    run, out = tmp_path / "smollm2_135m_preference", tmp_path / "exported"
    export_decoder(decoder_folder(run), out, tokenizer_of(run))
    model, tokenizer = (A.from_pretrained(out) for A in (AutoModelForCausalLM, AutoTokenizer))
    question = [{"role": "user", "content": "the cat"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = chatml(("system", SYSTEM), ("user", "the cat")) + "<|im_start|>assistant\n"
    assert tokenizer.decode(inputs["input_ids"][0]) == prompt
    assert model(**inputs).logits.shape[-1] == VOCAB
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"
