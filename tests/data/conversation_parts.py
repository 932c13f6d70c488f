"""Conversations for tests, and how they come out as documents."""

import json

import pytest

from smol.data.chat import default_template
from smol.data.conversation_tokens import Rendering, documents
from smol.data.tokenizer import load_tokenizer

USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "a dog"}
REASONED = {"role": "assistant", "content": "<think>\nhm\n</think>\na dog"}
PLAIN, THINKING = [USER, ANSWER], [USER, REASONED]
OWN = {"reasoning_content": "hm", "role": "assistant", "content": "a dog"}


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture(scope="module")
def template(sources):
    return default_template(load_tokenizer(sources / "tokenizer"))


def rendered(config, template, held_out=False, **rendering):
    notes = {}
    settings = {"context": 256} | rendering
    made = list(documents(config, Rendering(template, **settings), held_out, notes))
    return [document for (document,) in made], notes


def texts(found, template, trained=None):
    decode = template.tokenizer.decode
    return [decode(d.tokens if trained is None else d.tokens[d.trained]) for d in found]
