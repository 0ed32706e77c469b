"""The last steps of two pages, as they stand there: a merged adapter in transformers and PEFT."""

import doc_files
import numpy as np
from doc_blocks import ROOT, TORCH, of
from test_docs_commands import chat

from enmp_jax.cli import main as cli


def test_the_merged_adapter_of_the_quickstart_is_loaded(tmp_path, monkeypatch):
    doc_files.save_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    adapters = [f"--adapter={task}=adapters/{task}" for task in doc_files.CLASSES]
    assert cli.main(["merge", *adapters, "--method=sum", "--format=peft", "--out=runs/first/merged"]) == 0
    (block,) = (block for block in of(ROOT / "docs/quickstart.md", "python") if TORCH.search(block.text))
    names: dict = {}
    exec(compile(block.text, "quickstart.md", "exec"), names)
    assert names["scores"].shape == (1, 2)
    with names["model"].disable_adapter():
        inputs = names["tokenizer"]("the cat sat on the mat", return_tensors="pt")
        base = names["model"](**inputs).logits.detach().numpy()
    assert np.abs(base - names["scores"].detach().numpy()).max() > 1e-3  # the adapter does something


def test_the_merged_adapter_of_chat_models_is_loaded(tmp_path, monkeypatch):
    import torch

    chat(tmp_path)
    monkeypatch.chdir(tmp_path)  # where a directory has the name of the page's hub id
    adapters = [f"--adapter={task}=adapters/{task}" for task in ("support", "german")]
    assert cli.main(["merge", *adapters, "--method=sum", "--format=peft", "--out=runs/chat/merged"]) == 0
    (block,) = (block for block in of(ROOT / "docs/chat-adapters.md", "python") if TORCH.search(block.text))
    names: dict = {}
    exec(compile(block.text, "chat-adapters.md", "exec"), names)
    model, tokens = names["model"], torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        merged = model(input_ids=tokens).logits
        with model.disable_adapter():
            assert (merged - model(input_ids=tokens).logits).abs().max() > 1e-3  # the adapter does something
