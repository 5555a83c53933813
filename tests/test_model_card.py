"""The model card: tags, the method's section and the citation; and what `push_to_hub` publishes, to a folder that stands for the hub."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from toys import build, train

from tasks.recipes import read


ROOT = Path(__file__).parents[1]


def card_of(folder):
    card = ModelCard.load(folder / "README.md")
    return card.data.tags or [], card.text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What is published, and with which token, by repository."""
    made = SimpleNamespace(folder=tmp_path / "hub", tokens=[])

    def create_repo(self, repo_id, *, token=None, **_):
        made.tokens.append(token)
        return SimpleNamespace(repo_id=f"us/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, token=None, ignore_patterns=None, **_):
        made.tokens.append(token)
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            target = made.folder / repo_id / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / file, target)
        return f"https://hub/{repo_id}"

    for function in (create_repo, upload_folder):
        monkeypatch.setattr(HfApi, function.__name__, function)
        # Earlier versions of transformers import them by name.
        monkeypatch.setattr(transformers.trainer, function.__name__, lambda *args, f=function, **kwargs: f(None, *args, **kwargs), raising=False)  # fmt: skip
    return made


def test_a_card_has_tags_settings_and_the_citation(tmp_path):
    trainer = train(tmp_path, rho=0.25, alpha=1.0)
    for _ in range(2):  # written anew each time
        trainer.create_model_card(tags="points", dataset="points", finetuned_from="scratch")
        tags, text = card_of(tmp_path)
        assert tags == ["points", "xsam", "sharpness-aware", "generated_from_trainer"]
        assert text.count("## XSAM") == 1 and "| rho | 0.25 |" in text and "| alpha | 1.0 |" in text
        assert "[SAM](https://arxiv.org/abs/2010.01412)" in text
    trainer.create_model_card("en", "mit", ["third"], finetuned_from="scratch")
    assert {"third", "xsam", "points"} <= set(card_of(tmp_path)[0])
    paper = read(ROOT / "CITATION.cff")["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for part in (paper["title"], authors, paper["url"], paper["collection-title"], f"year = {{{paper['year']}}}"):
        assert part in text


def test_the_card_of_another_method_is_not_that_of_sam(tmp_path):
    for name, method in {"xsam": {}, "asam": {"perturbation": "asam", "alpha": 1.0}}.items():
        build(tmp_path / name, rho=0.25, **method).create_model_card(finetuned_from="scratch")
        assert "SAM](https://arxiv.org/abs/2010.01412)" not in card_of(tmp_path / name)[1]


def test_a_plain_run_has_a_plain_card(tmp_path):
    build(tmp_path, rho=0.0).create_model_card(tags="points", finetuned_from="scratch")
    tags, text = card_of(tmp_path)
    assert tags == ["points", "generated_from_trainer"] and "XSAM" not in text


def test_what_is_pushed_has_the_card_and_no_secret_in_it(tmp_path, hub):
    trainer = train(tmp_path / "ours", rho=0.25, hub_token="hf_aSecret", save_strategy="steps", save_steps=4)
    assert trainer.push_to_hub(blocking=True, tags=["points"], finetuned_from="scratch") == "https://hub/us/ours"
    published = hub.folder / "us" / "ours"
    assert hub.tokens == ["hf_aSecret"] * 2
    tags, text = card_of(published)
    assert tags[:3] == ["points", "xsam", "sharpness-aware"] and "| rho | 0.25 |" in text
    files = {str(file.relative_to(published)) for file in published.rglob("*") if file.is_file()}
    assert {"README.md", "xsam_search.jsonl"} <= files and not any("checkpoint" in file for file in files)
    secret = {file for file in files if b"hf_aSecret" in (published / file).read_bytes()}
    assert secret == {"training_args.bin"}  # the Trainer's arguments, as it is told in docs/troubleshooting.md


def test_releases_and_cards_cite_one_version(tmp_path):
    build(tmp_path, rho=0.1).create_model_card(finetuned_from="scratch")
    (version,) = re.findall(r"by `xsam_hf` (\d+\.\d+\.\d+):", card_of(tmp_path)[1])
    assert f'__version__ = "{version}"' in (ROOT / "xsam_hf" / "__init__.py").read_text()
