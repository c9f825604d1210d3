"""The picture of the routing in a model card."""

from types import SimpleNamespace

import small_writer
import torch

from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.export import picture


def run_of(data):
    config = SimpleNamespace(data=str(data), seq_len=32, mask_documents=False)
    return SimpleNamespace(load_config=lambda: config)


def test_the_picture_shows_the_shares_of_the_exported_model(corpus, tmp_path, monkeypatch):
    drawn = []
    draw = picture.routed_share_by_domain
    monkeypatch.setattr(picture, "routed_share_by_domain", lambda *given: drawn.append(given) or draw(*given))
    monkeypatch.setattr(picture, "TOKENS", 200)
    model = small_writer.model()
    model.set_max_experts(1)
    section = picture.routing_picture(model, run_of(corpus), tmp_path)
    ((share_CLE, domains, k),) = drawn
    assert (domains, k) == (["farm", "town"], 1)
    windows = ValidationWindows(open_dataset(corpus).validation, 32)
    tokens = 0
    for domain, shares_LE in zip(domains, share_CLE, strict=True):
        ids, _, mask = next(iter(windows.batches(domain, 64, windows.shares(200)[domain])))
        tokens += int(mask.sum())
        with torch.no_grad():
            routings = model(ids, attention_mask=mask.long()).routings
        for routing, expected_E in zip(routings, shares_LE, strict=True):
            share_E = (routing.gate_TE != 0)[mask.flatten()].float().mean(dim=0)
            torch.testing.assert_close(share_E, torch.tensor(expected_E), atol=1e-4, rtol=0)
    assert 0 < sum(map(sum, share_CLE[0])) <= 2  # layers, each with at most one expert of a token
    assert f"on {tokens:,} tokens of the validation text" in section
    assert "](routing.png)" in section
    assert [path.name for path in tmp_path.iterdir()] == ["routing.png"]
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_without_data_or_routing_there_is_no_picture(tmp_path, caplog):
    section = picture.routing_picture(small_writer.model(), run_of(tmp_path / "gone"), tmp_path)
    assert "the routing is not shown" in section
    assert caplog.messages[0].startswith("the model card has no picture of the routing: ")
    assert picture.routing_picture(small_writer.model(router="dense"), run_of(tmp_path / "gone"), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
