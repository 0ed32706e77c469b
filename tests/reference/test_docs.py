"""The quickstart's last step, as it stands on the page: a merged adapter in transformers and PEFT."""

import doc_files
import numpy as np
from doc_blocks import ROOT, TORCH, of

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
