"""Arguments of the translation task: obeyed or refused, never passed over."""

import json

import pytest
from translation_toys import flags, parse, write, write_word_for_word

from tasks.translation import train as task
from tasks.translation.data import DataArguments, load
from tasks.translation.trainer import TranslationTrainer


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_word_for_word(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"generation_num_beams": 0}, "`generation_num_beams` is 0: give 1 for greedy search"),
        ({"generation_num_beams": -1}, "`generation_num_beams` is -1"),
        (
            {"generation_max_length": 20},
            r"`generation_max_length` is 20, but a hypothesis may have 1.2 n \+ 10 tokens",
        ),
        ({"generation_config": "somewhere"}, "`generation_config` is somewhere, but the search is fairseq's"),
        ({"per_device_train_batch_size": 64}, "`per_device_train_batch_size` is 64, but `max_tokens` limits a batch"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size` is True"),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last` is True, but every sentence comes once"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` is .*group_by_length"),
        ({"predict_with_generate": False}, "`predict_with_generate` is False, but the scores need translations"),
        ({"sortish_sampler": True}, "`sortish_sampler` is True, but batches hold sentences of like length"),
        ({"dataset_config": "de-en"}, "`dataset_config` is 'de-en', but `dataset` .* has no use for it"),
    ],
)
def test_what_would_be_passed_over_is_refused(text, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        task.train(*parse(*flags(text, tmp_path, **changes)))
    assert not any(tmp_path.iterdir())


def test_prepared_data_has_its_own_merges(tmp_path):
    for name in ("train", "valid", "test"):
        write(tmp_path, name, [("a b", "a b")])
    for language in ("de", "en"):
        (tmp_path / f"dict.{language}.txt").write_text("a 1\nb 1\n")
    load(DataArguments(dataset=str(tmp_path)))
    with pytest.raises(ValueError, match="`bpe_merges` is 30, but `dataset` .* has no use for it: leave it out"):
        load(DataArguments(dataset=str(tmp_path), bpe_merges=30))


@pytest.mark.parametrize("name", ["handbook", "ding"])
def test_data_of_ours_have_no_configuration(name):
    with pytest.raises(ValueError, match=f"`dataset_config` is 'x', but `dataset` {name} has no use for it"):
        load(DataArguments(dataset=name, dataset_config="x"))


def test_a_file_has_no_configuration(tmp_path):
    (tmp_path / "x.json").write_text('{"de": "a", "en": "b"}\n')
    with pytest.raises(ValueError, match="`dataset_config` is 'x', and a file has none"):
        load(DataArguments(dataset=str(tmp_path / "x.json"), dataset_config="x"))


def test_dropout_is_that_of_a_saved_model_too(text, tmp_path):
    base = {"max_steps": 1, "save_strategy": "no", "threads": 1}
    task.train(*parse(*flags(text, tmp_path / "first", **{**base, "dropout": 0.2})))
    arguments = flags(text, tmp_path, model=tmp_path / "first")
    for given, expected in ((["--dropout", "0.4"], 0.4), ([], 0.2)):
        line = [*arguments[: arguments.index("--dropout")], *arguments[arguments.index("--dropout") + 2 :], *given]
        parsed, _ = parse(*line)
        model = task.build_model(parsed, load(parsed))
        assert model.config.dropout == expected == model.model.encoder.dropout
    assert json.loads((tmp_path / "first" / "result.json").read_text())["identity"]["dropout"] == 0.2


@pytest.mark.parametrize("beams, expected", [(None, 5), (1, 1), (3, 3)])
def test_the_number_of_beams_is_obeyed(text, tmp_path, monkeypatch, beams, expected):
    seen = []
    real = task.models.TranslationTransformer.translate

    def translate(model, *arguments, num_beams, **kwargs):
        seen.append(num_beams)
        return real(model, *arguments, num_beams=num_beams, **kwargs)

    monkeypatch.setattr(task.models.TranslationTransformer, "translate", translate)
    line = flags(text, tmp_path, max_steps=1, save_strategy="no", generation_num_beams=2)
    at = line.index("--generation_num_beams")
    line = line[:at] + line[at + 2 :] + ([] if beams is None else ["--generation_num_beams", beams])
    task.train(*parse(*line))
    assert set(seen) == {expected}


def test_workers_are_kept_if_asked_for(text, tmp_path):
    _, args = parse(
        *flags(
            text, tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_prefetch_factor=3
        )
    )
    trainer = TranslationTrainer(
        model=task.models.build("transformer-small", 16, 16),
        args=args,
        train_dataset=load(DataArguments(dataset=str(text), bpe_merges=30)).splits["train"],
        max_tokens=100,
    )
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (1, True, 3)
