"""Registers the best model of an experiment as the champion in MLflow: `python -m tools champion`."""

from pathlib import Path
from typing import Any

import click

from tools.command import command
from tools.compare import experiment_here, interval, words
from tracking import comparison
from tracking.comparison import Result, journal_results, select
from tracking.console import repository
from tracking.history import holders
from tracking.mlflow_results import server_results
from tracking.mlflow_server import connect, explained, has_run, is_server, resolve_uri

NAME, ALIAS = "nanogpt", "champion"


@command()
@click.argument("experiment")
@click.option("--force", is_flag=True, help="Register it even if a check fails; a tag of the version records why.")
def main(experiment: str, force: bool) -> None:
    """Makes the best model of EXPERIMENT the champion.

    EXPERIMENT may also be a run, a commit or a pattern such as 'wide-*'. The champion is the version of MLflow's
    registered model `nanogpt` with the alias `champion`, which `python -m tools serve` serves. The new model must beat
    the present champion in `compare`, and its run must be reproduced to the bit in a clean clone.
    """
    root = repository()
    uri = resolve_uri(root)
    results = finished_runs(root, uri)
    best = best_of(select(results, experiment, root))
    with explained(uri):
        client = connect(uri, root)
        present = champion(client)
    if present is not None and present.run_id == best.id:
        click.echo(f"{best.name} is the champion already (version {present.version})")
        return
    objections = []
    if present is not None:
        objections += against(results, best, present.run_id)
    if not objections or force:
        objections += not_reproduced(root, best)
    if objections and not force:
        raise ValueError(
            f"{best.name} does not become the champion: {'; '.join(objections)}. --force registers it anyway"
        )
    with explained(uri):
        now = champion(client)
        if now is not None and (present is None or now.version != present.version):  # another member's, meanwhile
            raise ValueError(f"version {now.version} of {NAME} became the champion in the meantime; run this again")
        version = register(client, best, objections)
    click.echo(f"{best.name} is the champion: version {version} of {NAME}, val loss {best.scores['val_loss']:.4f}")


def finished_runs(root: Path, uri: str) -> list[Result]:
    """The finished runs of this repository, and those that a team's server has in params.yaml's experiment."""
    results, _ = journal_results(root)
    if is_server(uri):
        here = {result.id for result in results}
        results += [result for result in server_results(root, experiment_here())[0] if result.id not in here]
    return results


def best_of(found: list[Result]) -> Result:
    """The run with the lowest loss of one setting. Raises ValueError if the runs have several settings."""
    labels = sorted(setting.label for part in comparison.compare(found)[0] for setting in part.settings)
    if len(labels) > 1:
        names = "; ".join(filter(None, labels)) or "they differ in their text"
        raise ValueError(f"that is {len(labels)} settings: {names}; choose one")
    return min(found, key=lambda result: result.scores["val_loss"])


def champion(client: Any) -> Any | None:
    """The version of MLflow's registered model that is the champion; None if there is none yet."""
    if not client.search_registered_models(f"name = '{NAME}'"):
        return None
    model = client.get_registered_model(NAME)
    return client.get_model_version(NAME, model.aliases[ALIAS]) if ALIAS in model.aliases else None


def against(results: list[Result], challenger: Result, present: str) -> list[str]:
    """Why the setting of the challenger does not beat that of the present champion; empty if it does."""
    reigning = next((result for result in results if result.id == present), None)
    if reigning is None:
        return [f"the champion's run {present} is neither in this repository nor in tracking.experiment"]
    code, both = reigning.tags.get("code.sha256"), {reigning.setting, challenger.setting}

    def reigns(result: Result) -> bool:
        same = result.model == reigning.model or result.tags.get("code.sha256") == code
        return same and result.setting == reigning.setting

    parts, _ = comparison.compare([result for result in results if result.setting in both], reigns)
    for part in parts:
        for setting, difference in zip(part.others, part.differences, strict=True):
            if challenger.id in {result.id for result in setting.results}:
                if difference.verdict == "better":
                    return []
                shown = f"{difference.mean:+.4f} {interval(difference)}".rstrip()
                return [f"against {reigning.name}, {shown}: {words(difference)}"]
    return [f"it was not evaluated on the same text as {reigning.name}, or is the same setting"]


def not_reproduced(root: Path, result: Result) -> list[str]:
    """Why the run was not reproduced in a clean clone; empty if it was."""
    from tracking.verification import check_all

    held = [holder for holder in holders(root, result.tags["model.md5"]) if not holder.differs]
    if not held:
        return ["no commit or experiment has the model in its dvc.lock: commit the result, or run it as an experiment"]
    report = check_all(root, False, lambda line: click.echo(line, err=True), held[0].commit)
    return [f"`verify` of {held[0].name} says {report.verdict}"] if report.exit_code else []


def register(client: Any, result: Result, objections: list[str]) -> str:
    """Registers the published model of a run as the champion; returns the version. Raises ValueError."""
    if result.id == result.tags.get("attempt") or not has_run(client, result.id):
        raise ValueError(f"MLflow has no run {result.id}; `python -m tools sync` sends it")
    run = client.get_run(result.id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{result.id}'")
    models = [model for model in found if model.name == result.params.get("train.publish", "best")] or list(found)
    if not models:
        raise ValueError(f"MLflow has no model of run {result.id}; `python -m tools sync` sends it")
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    tags = {"model.sha256": result.model} | ({"forced": "; ".join(objections)} if objections else {})
    model = models[0]
    source = f"models:/{model.model_id}"  # independent of where its files are
    version = client.create_model_version(NAME, source, result.id, tags=tags, model_id=model.model_id).version
    client.set_registered_model_alias(NAME, ALIAS, version)
    return str(version)
