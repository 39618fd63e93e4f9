"""How arms differ, from their configurations."""

import json

from hypothesis import given
from hypothesis import strategies as st
from run_folders import REDUCED, write_run, write_study

from studies import arms, options, table_2, verdicts

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "qk_norm": st.booleans(),
        "learning_rate": st.sampled_from([3e-3, 6e-3, 0.0060000001]),
        "weight_decay_attn": st.sampled_from([None, 0.0, 0.1]),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "n_kv_head": st.sampled_from([None, 1, 2]),
        "beta1": st.floats(0.5, 0.99),
        "dropout": st.sampled_from([0.0, 1e-9, 0.1]),
    },
)


@given(st.lists(CHANGES, min_size=2, max_size=5))
def test_arms_with_different_options_have_different_texts(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("arms")
    results = arms.load([write_run(folder / f"arm{'abcde'[i]}", 1 + i, 2.0, **own) for i, own in enumerate(changes)])
    texts = options.option_texts(results.cells)
    assert len(set(texts)) == len(texts) == len(results.cells)
    rows = [row[1:] for row in table_2.table_2(results.cells).rows]
    assert len({tuple(row) for row in rows}) == len(rows)


def test_only_what_differs_is_named_and_defaults_are_not(tmp_path):
    cells = arms.load(
        [
            write_run(tmp_path / "a", 1, 2.0, learning_rate=3e-3, dropout=0.1),
            write_run(tmp_path / "b", 1, 2.0, learning_rate=6e-3, dropout=0.1, qk_norm=True),
        ]
    ).cells
    assert options.option_texts(cells) == ["learning_rate 0.003", "qk_norm, learning_rate 0.006"]
    assert options.summary(cells) == "qk_norm, learning_rate (0.003 / 0.006)"
    assert options.summary(cells[:1]) is None


def test_an_option_that_another_one_replaces_is_no_difference(tmp_path):
    folders = [
        write_run(tmp_path / name, 1, 2.0, attn_scale=scale, attn_logit_std=0.3, **more)
        for name, scale, more in (("a", 1.0, {}), ("b", 0.5, {"wq_identity": True}))
    ]
    assert options.summary(arms.load(folders).cells) == "wq_identity"


def test_runs_that_changed_on_the_way_are_an_arm_of_their_own_and_say_so(tmp_path):
    folders = [write_run(tmp_path / name, seed, 2.0) for name, seed in (("a-s1", 1), ("b-s2", 2), ("b-s3", 3))]
    for folder in folders[1:]:
        facts = json.loads((folder / "run.json").read_text())
        segments = [{"step": 0}, {"step": 20, "changed": {"weight_decay": [0.30000000000000004, 0.1]}}]
        (folder / "run.json").write_text(json.dumps(facts | {"segments": segments}))
    cells = arms.load(folders).cells
    assert options.option_texts(cells) == [
        "–",
        "changed on the way (seed 2, 3): weight_decay 0.3 → 0.1 from step 20",
    ]


def test_a_difference_that_the_study_is_not_about_gets_a_warning(tmp_path):
    fields = {"a": {"dropout": 0.1}, "b": REDUCED, "c": {"wq_identity": True}}
    grid = {"learning_rate": [0.001, 0.002]}

    def loss(arm, seed, learning_rate):
        return 2 + abs(learning_rate - (0.001 if arm == "a" else 0.002)) + seed / 10

    folder = write_study(tmp_path / "s", fields, loss, grid)
    assert verdicts.unfair(arms.load([folder])) == [], "a study that does not say what it is about"
    results = arms.load([folder], about=["wq_identity", "attn_scale"])
    assert verdicts.unfair(results) == [
        "Warning: b and a do not match: dropout 0 against 0.1, weight_decay 0.03125 against 0.1.",
        "Warning: c and a do not match: dropout 0 against 0.1.",
    ]
    content = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(content | {"about": ["wq_identity", "attn_scale", "dropout"]}))
    (warning,) = verdicts.unfair(arms.load([folder]))
    assert warning.endswith("do not match: weight_decay 0.03125 against 0.1.")


def test_what_differs_is_what_the_configurations_say(tmp_path):
    runs = [write_run(tmp_path / "a", 1, 2.0), write_run(tmp_path / "b", 2, 2.0, **REDUCED, resume=True)]
    a, b = (json.loads((run / "config.json").read_text()) for run in runs)
    expected = {name for name in a if a[name] != b[name]} - {"seed", "data_seed", "out_dir", "resume"}
    cells = arms.load(runs).cells
    assert set(options.differing(cells)) == expected == {"wq_identity", "attn_scale", "weight_decay"}
