"""The switch of document masking, against a decoder that is given rows by hand."""

import numpy as np
import torch
from tiny import make_data

from smol.data.batch import token_tensors
from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights

EOS = 0


def test_without_masking_a_row_is_one_document() -> None:
    rows = np.array([[3, 4, EOS, 5, 6, EOS, 7, 8, 9], [EOS, 1, 2, 3, 4, 5, 6, 7, 8]])
    tensors = token_tensors(rows, EOS, document_masking=False)
    assert not tensors["documents"].any()
    assert tensors["positions"].tolist() == [list(range(8))] * 2
    kept_apart = token_tensors(rows, EOS)
    for name in ("tokens", "targets"):
        assert torch.equal(tensors[name], kept_apart[name])

    decoder = Decoder(DecoderConfig(16, 8, 1, 2, 1, 16), RopeConfig())
    init_weights(decoder, seed=0)

    def hidden(tokens, positions, documents):
        return decoder(tokens, positions, documents, head=lambda h, weight: h)

    names = ("tokens", "positions", "documents")
    mixed = hidden(*(tensors[name] for name in names))
    torch.testing.assert_close(mixed, hidden(tensors["tokens"], tensors["positions"], None))
    assert not torch.allclose(mixed[0, 6:], hidden(*(kept_apart[n] for n in names))[0, 6:])


def test_training_reads_rows_as_one_and_held_out_text_by_document(tmp_path_factory) -> None:
    from tiny import prepare_sources

    sources = prepare_sources(tmp_path_factory.mktemp("masking"))
    batches = {}
    for masking in (True, False):
        data = make_data(sources, document_masking=masking)
        data.setup()
        batches[masking] = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    (train, held_out), (unmasked, same) = batches[True], batches[False]
    assert torch.equal(train.tokens, unmasked.tokens)
    assert train.documents.any()
    assert not unmasked.documents.any()
    assert torch.equal(held_out.documents, same.documents)
