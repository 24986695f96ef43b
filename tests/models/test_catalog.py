"""A model is named by its key, its Hub id or its folder, and by nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import catalog


def test_every_entry_says_where_it_comes_from_and_what_it_needs():
    assert list(catalog.CATALOGUE) == ["smollm2-135m", "phi-3-mini", "tiny-phi3"]
    for key, model in catalog.CATALOGUE.items():
        assert catalog.find(key) is model
        assert model.key == key
        assert model.licence in ("MIT", "Apache-2.0")
        assert model.disk > 0
        assert model.memory > 0
        assert set(model.published) <= set(catalog.PRECISIONS)


def test_phi_3_is_pinned_to_a_commit_and_has_its_published_folder():
    model = catalog.find("phi-3-mini")
    assert model.origin.repo == "microsoft/Phi-3-mini-4k-instruct"
    assert len(model.origin.revision) == 40
    assert model.published["int4"].folder == "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"


def test_the_system_message_leads_the_question_only_where_there_is_one():
    question = {"role": "user", "content": "Hi"}
    assert catalog.find("phi-3-mini").messages("Hi") == [question]
    assert catalog.find("smollm2-135m").messages("Hi") == [{"role": "system", "content": ""}, question]


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "main"),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
    ],
)
def test_a_hub_id_may_name_a_revision(name: str, repo: str, revision: str):
    model = catalog.find(name)
    assert model.origin == catalog.Hub(repo, revision)
    assert "/" not in model.key


def test_a_model_is_offered_in_all_precisions_unless_its_makers_or_readers_chose(tmp_path: Path):
    for name in ("smollm2-135m", "org/name"):
        assert catalog.find(name).precisions == catalog.PRECISIONS
    assert catalog.find("phi-3-mini").precisions == ("int4",)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert catalog.find(str(tmp_path)).precisions == catalog.PRECISIONS
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    assert catalog.find(str(tmp_path)).precisions == ()


def test_a_model_says_what_its_checkpoint_and_its_published_folder_take():
    assert str(catalog.find("phi-3-mini")).endswith("7,645 MB on disk, 2,720 MB in ONNX, 8,700 MB of memory")
    assert str(catalog.find("smollm2-135m")).endswith("542 MB on disk, 1,000 MB of memory")


def test_a_folder_is_a_model_if_it_holds_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"neither config\.json .* nor genai_config\.json"):
        catalog.find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert catalog.find(str(tmp_path)).origin == catalog.Folder(tmp_path)
    assert not catalog.find(str(tmp_path)).origin.is_onnx
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    assert catalog.find(str(tmp_path)).origin.is_onnx


def test_two_folders_of_one_name_have_keys_of_their_own(tmp_path: Path):
    keys = set()
    for parent in ("a", "b"):
        folder = tmp_path / parent / "smollm2-135m"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        keys.add(catalog.find(str(folder)).key)
    assert len(keys | set(catalog.CATALOGUE)) == 2 + len(catalog.CATALOGUE)


@pytest.mark.parametrize(
    "name",
    ["", "phi3", "no/such/folder", "../up", "a/..", "a/b@../../x", "a b/c", "/no/folder", "org/name@-x"],
)
def test_anything_else_is_refused_with_value_choice_and_next_step(name: str):
    with pytest.raises(
        ValueError, match=r"^model=.* is not one of smollm2-135m, phi-3-mini, .*Set it with -p model"
    ):
        catalog.find(name)


@given(st.text(alphabet="ab/.@-_\\~ \n\0", max_size=12))
def test_no_name_can_lead_out_of_the_weights_folder(name: str):
    try:
        key = catalog.find(name).key
    except ValueError:
        return
    assert Path(key).name == key
    assert key not in (".", "..")
