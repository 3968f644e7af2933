"""Which models of a site are tested on which sets, and that each test measures the model it says."""

from dataclasses import replace

import pytest

from client.evaluation.choices import Question, accuracy, encoded
from client.evaluation.examination import EvalSet, _in_use, examine, held_out_set
from client.evaluation.expert_use import expert_use
from client.evaluation.generation import greedy, rouge_l
from client.evaluation.held_out import held_out_loss
from client.evaluation.measured import BASE, GLOBAL, PERSONAL
from client.model import AdaptedModel
from client.private import under
from client.site import POOLED, Site
from client.text import Example, encode, encode_prompts
from conf.methods import LocalOnlyConfig, PflMoeConfig, SftConfig
from conf.model import RouterTraining
from conf.schema import EvalConfig
from tests.client.test_site import HELD_OUT, TRAIN, first_global, make_site, noisy, settings_for
from tests.client.tiny_models import save_tiny_base

pytestmark = pytest.mark.slow

ELSEWHERE = [Example("Name a fish.", "", "eel"), Example("Name a bird.", "", "owl")]
OTHERS = {
    "there": EvalSet(ELSEWHERE),
    "*choices*": EvalSet(
        questions=[Question("Which?", "", ("this", "that"), 0), Question("Who?", "", ("he", "she"), 1)]
    ),
}
EVAL = EvalConfig(num_answers=1, max_new_tokens=3, batch_size=16)


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


def examined_site(base_config, folder, method=None, router=RouterTraining.frozen, **evaluation):
    config = replace(settings_for(base_config, method, router), eval=replace(EVAL, **evaluation))
    site = make_site(config, folder)
    return Site(
        "here", TRAIN, {"here": HELD_OUT, POOLED: ELSEWHERE}, adapted=site.adapted, config=config, store=site.store,
        other_sets=OTHERS,
    )  # fmt: skip


def found(measured):
    """(model, set) -> score."""
    return {(each.model, each.on): each.score for each in measured.scores}


def loss_of(site, adapter, examples):
    sequences = encode(examples, site.adapted.tokenizer, site.config.data)
    return held_out_loss(site.adapted, adapter, sequences, 16).loss


def test_where_all_use_the_global_model_base_and_global_are_tested_on_the_sites_own_data(base_config, tmp_path):
    site = examined_site(base_config, tmp_path)
    received = noisy(site.train(1, first_global(site)).adapter, seed=0)
    measured = examine(site, received, received)
    scores = found(measured)
    assert scores.keys() == {(BASE, "here"), (GLOBAL, "here")}
    assert measured.cost is None
    assert scores[GLOBAL, "here"].loss == pytest.approx(loss_of(site, received, HELD_OUT))
    assert scores[BASE, "here"].loss == pytest.approx(loss_of(site, first_global(site), HELD_OUT))
    assert scores[GLOBAL, "here"].num_examples == 2


def test_experts_use_is_that_on_all_own_sets(base_config, tmp_path):
    """As a centralised site's, which has those of every original site."""
    site = examined_site(base_config, tmp_path)
    sets = {"here": EvalSet(HELD_OUT), "there": EvalSet(ELSEWHERE)}
    of_all = Site(
        "everyone", TRAIN, {name: each.examples for name, each in sets.items()}, adapted=site.adapted,
        config=site.config, store=site.store,
    )  # fmt: skip
    received = noisy(first_global(site), seed=0)
    sequences = encode([*HELD_OUT, *ELSEWHERE], site.adapted.tokenizer, site.config.data)
    assert examine(of_all, received, received).routing == expert_use(site.adapted, received, sequences, 16)


def test_answers_are_those_of_the_model_to_the_first_examples(base_config, tmp_path):
    site = examined_site(base_config, tmp_path, num_answers=2)
    received = noisy(first_global(site), seed=0)
    score = found(examine(site, received, received))[GLOBAL, "here"]
    prompts = encode_prompts(HELD_OUT, site.adapted.tokenizer, site.config.data)
    answers = site.adapted.tokenizer.batch_decode(greedy(site.adapted, received, prompts, 3, batch_size=16))
    assert score.rouge_l == rouge_l(answers, [example.response for example in HELD_OUT])
    assert (score.num_answers, score.accuracy, score.num_questions) == (2, None, 0)


@pytest.mark.parametrize(
    ("method", "router"),
    [(LocalOnlyConfig(), RouterTraining.frozen), (SftConfig(), RouterTraining.local)],
)
def test_model_of_its_own_is_tested_on_every_set(base_config, tmp_path, method, router):
    site = examined_site(base_config, tmp_path, method, router)
    update = site.train(1, first_global(site))
    received = noisy(update.adapter, seed=0)
    measured = examine(site, received, received)
    scores = found(measured)
    personal = {on for model, on in scores if model == PERSONAL}
    assert personal == {"here", "there", "*choices*"}
    assert ((GLOBAL, "here") in scores) == (not site.method.personal)
    own = site.adapter_in_use(received)
    assert scores[PERSONAL, "there"].loss == pytest.approx(loss_of(site, own, ELSEWHERE))
    assert scores[PERSONAL, "here"].loss != pytest.approx(scores[BASE, "here"].loss)
    assert (scores[PERSONAL, "*choices*"].loss, scores[PERSONAL, "*choices*"].num_questions) == (None, 2)
    assert measured.routing == expert_use(
        site.adapted, own, encode(HELD_OUT, site.adapted.tokenizer, site.config.data), 16
    )
    assert measured.cost is None


@pytest.mark.parametrize(("method", "num_loads"), [(LocalOnlyConfig(), 1), (PflMoeConfig(), 2 * 4)])
def test_options_are_scored_together_where_one_adapter_is_in_use(base_config, tmp_path, monkeypatch, method, num_loads):
    """Whoever mixes two tells the mean alone, so each of the four options takes both."""
    site = examined_site(base_config, tmp_path, method)
    received = noisy(site.train(1, first_global(site)).adapter, seed=0)
    (score,) = [each for (_, on), each in found(examine(site, received, received)).items() if on == "*choices*"]
    model = _in_use(site, received)
    questions = encoded("*choices*", OTHERS["*choices*"].questions, site.adapted.tokenizer, site.config.data)
    options = [option for question in questions for option in question.options]
    alone = [site.in_use(received).loss([option]).loss for option in options]
    loads, load = [], AdaptedModel.load_adapter
    monkeypatch.setattr(AdaptedModel, "load_adapter", lambda self, adapter: loads.append(load(self, adapter)))
    assert model.losses(options) == pytest.approx(alone, rel=1e-5)
    assert len(loads) == num_loads
    assert score.accuracy == accuracy(lambda _: alone, questions)


def test_mixture_is_tested_as_a_personal_model_and_costs_two(base_config, tmp_path):
    site = examined_site(base_config, tmp_path, PflMoeConfig())
    received = noisy(site.train(1, first_global(site)).adapter, seed=0)
    measured = examine(site, received, received)
    scores = found(measured)
    assert scores[PERSONAL, "here"].loss == pytest.approx(site.evaluate(received)["here"].loss)
    assert scores[GLOBAL, "here"].loss == pytest.approx(loss_of(site, received, HELD_OUT))
    assert scores[PERSONAL, "here"].loss != pytest.approx(scores[GLOBAL, "here"].loss)
    assert measured.cost.flops == pytest.approx(2, rel=0.01)


def test_adapter_that_the_server_made_for_one_site_is_its_personal_model(base_config, tmp_path):
    """As CLAIR's: the site is sent the global one too."""
    site = examined_site(base_config, tmp_path)
    common, mine = (noisy(first_global(site), seed) for seed in (0, 1))
    scores = found(examine(site, mine, common))
    assert scores[PERSONAL, "here"].loss == pytest.approx(loss_of(site, mine, HELD_OUT))
    assert scores[GLOBAL, "here"].loss == pytest.approx(loss_of(site, common, HELD_OUT))


def test_options_make_questions_of_the_held_out_examples(base_config, tmp_path):
    site = examined_site(base_config, tmp_path, options=["teal", "azure", "mauve"])
    score = found(examine(site, first_global(site), first_global(site)))[BASE, "here"]
    assert score.num_questions == 2
    assert score.accuracy in {0.0, 0.5, 1.0}
    assert [question.answer for question in held_out_set(HELD_OUT, site.config).questions] == [0, 1]


def test_set_without_an_answerable_question_has_no_accuracy_and_is_named(base_config, tmp_path, caplog):
    site = examined_site(base_config, tmp_path, options=["teal", "azure", "azure"])
    score = found(examine(site, first_global(site), first_global(site)))[BASE, "here"]
    assert (score.accuracy, score.num_questions, score.num_examples) == (None, 0, 2)
    assert "here: 2 of 2 questions left out: 2 with two options of the same tokens" in caplog.messages


def test_examination_changes_nothing_at_the_site(base_config, tmp_path):
    site = examined_site(base_config, tmp_path, PflMoeConfig())
    received = site.train(1, first_global(site)).adapter
    before = site.store.path.read_bytes()
    assert found(examine(site, received, received)) == found(examine(site, received, received))
    assert site.store.path.read_bytes() == before
    assert under("pfl_moe/local/", site.store.load()).keys() == received.keys()
