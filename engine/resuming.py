"""How a run is saved, and goes on: from its own checkpoint, from another run's (a branch), or from weights alone.

`run` is a train.Trainer.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch

import configurator
from engine import checkpoint, devices, distributed, run_files
from engine.files import link, read_json
from train_config import OF_A_CALL, TrainConfig

SCRATCH = TrainConfig.init_from
TO_RESUME = (  # entries of a checkpoint, beside those of a model
    *("optimizer", "scaler", "rng", "best_val_loss", "config", "data_fingerprint", "train_seconds", "wall_seconds"),
)


def options(argv, usage):
    """name -> value of the fields of TrainConfig that a command line sets, above those of the run that goes on.

    What a run was started with need not be repeated to resume, branch or evaluate it, and a model is that of its
    weights unless other options are given.
    """
    given = configurator.read(TrainConfig, argv, usage=usage)
    names = [Path(path).stem for path in configurator.config_files(argv)]
    out_dir = given.get("out_dir") or (f"out/{'-'.join(names)}" if names else TrainConfig.out_dir)
    origin, stored = given.get("init_from", SCRATCH), None
    if given.get("resume") or given.get("eval_only"):
        stored = read_json(Path(out_dir) / run_files.CONFIG)
    if stored:
        stored.pop("max_seconds", None)
    elif not given.get("eval_only"):
        stored = branch_options(given)
    values = configurator.read(TrainConfig, argv, base=stored) | {"out_dir": out_dir}
    if origin != SCRATCH and not (given.get("resume") and stored):  # a run that goes on has its own
        values = checkpoint.model_options(origin) | values
    if given.get("eval_only"):
        values["init_from"] = origin  # not what the run began with: its own weights now
    return values


def branch_options(given):
    """What a branch takes over of its origin's options, name -> value, given the options of a command; {}: no branch.

    Raises ValueError where the origin is not the checkpoint of a run.
    """
    path = given.get("branch_from")
    if path is None:
        return {}
    if given.get("init_from", SCRATCH) != SCRATCH:
        raise ValueError("--init_from begins with weights alone, --branch_from goes on with a run: give one of them")
    config = checkpoint.run_options(path)
    if not config:
        raise ValueError(f"{path} has weights and no run's options: start from it with --init_from={path}")
    return {name: config[name] for name in config if name not in (*OF_A_CALL, "wandb_run_name")}


def find_checkpoint(cfg, say):
    """The checkpoint that a run goes on with: the latest of its folder, for a branch at first that of branch_from.

    None where it begins at step 0. say: prints a line. Raises ValueError for a run in the way, and for a checkpoint
    with which cfg, a TrainConfig, cannot go on.
    """
    folder, origin = Path(cfg.out_dir), cfg.branch_from
    path = folder / run_files.CHECKPOINT
    is_own = cfg.eval_only or (cfg.resume and path.exists())
    if run_files.holds_run(folder) and not (cfg.resume or cfg.eval_only):
        raise ValueError(f"{folder} already contains a run: continue it with --resume, or choose another --out_dir")
    if cfg.eval_only and cfg.init_from != SCRATCH:
        return None
    if cfg.resume and not is_own:
        say(f"{folder} has no checkpoint yet: the run begins at {f'that of {origin}' if origin else 'step 0'}")
    if not (is_own or origin):
        return None
    path = path if is_own else Path(origin)
    state = checkpoint.load(path)
    if "optimizer" not in state:
        raise ValueError(f"{path} has weights and no optimizer state: start from it with --init_from={path}")
    changed = check_same_run(state, dataclasses.asdict(cfg), path)
    if is_own and origin and origin != state["config"].get("branch_from"):
        raise ValueError(f"{folder} holds a run that does not come from {origin}: choose another --out_dir")
    if changed and not cfg.eval_only:
        say(f"changed since the checkpoint: {'; '.join(changed)}")
    return state


def check_same_run(state, config, path):
    """What config, a dict of TrainConfig's fields, changes of a run's checkpoint, as a list of texts.

    Raises ValueError unless it can go on with it: the model, the seeds, tokens_per_step and the kind of optimizer make
    a run what it is.
    """
    missing = [name for name in TO_RESUME if name not in state]
    if missing:
        raise ValueError(
            f"{path} cannot be resumed without {', '.join(missing)}: start from its weights with --init_from={path}"
        )
    fixed = [*state["model_config"], "seed", "data_seed", "tokens_per_step", "optimizer"]
    differences = checkpoint.differing(state["config"], {name: config[name] for name in fixed})
    if differences:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differences)}. Repeat its options, or choose another --out_dir"
        )
    if state["step"] > config["max_iters"]:
        raise ValueError(f"{path} has {state['step']} steps already, more than max_iters={config['max_iters']}")
    return checkpoint.differing(state["config"], {name: config[name] for name in config if name not in OF_A_CALL})


def take_weights(run, state):
    """Begin with another run's weights, and nothing else of it. Raises ValueError when they cannot be those of cfg."""
    checkpoint.load_weights(run.model, state)
    differences = checkpoint.differing(state["model_config"], dataclasses.asdict(run.model.config))
    if differences and run.cfg.eval_only:
        raise ValueError(f"{run.cfg.init_from} can only be evaluated as it is: {'; '.join(differences)}")
    for text in differences:
        run.world.say(f"{run.cfg.init_from}: {text}")


def restore(run, state):
    """Take over everything but the weights from a checkpoint."""
    own = run.optimizer.param_groups
    options = [{name: group[name] for name in group if name not in ("params", "lr")} for group in own]
    run.optimizer.load_state_dict(distributed.shard_optimizer_state(run.optimizer, state["optimizer"]))
    for group, values in zip(run.optimizer.param_groups, options, strict=True):
        group.update(values)  # weight decay and betas are cfg's, not the checkpoint's
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.best_val_loss = state["step"], state["best_val_loss"]
    run.train_seconds = state["train_seconds"]
    run.started -= state["wall_seconds"]
    run.links = state.get("links", [])
    if run.cfg.branch_from and not (run.folder / run_files.CHECKPOINT).exists():
        run.past = past(run.cfg.branch_from, state)
        run.best_val_loss, run.links = math.inf, []  # of its own evaluations, which its own best.pt stands for
    if run.world.rank == 0:  # the checkpoint has the random state of the first process
        devices.set_random_state(state["rng"], run.device)
    else:
        torch.manual_seed(run.cfg.seed + 2**32 * run.world.rank + run.step)
    there, here = state["data_fingerprint"], run.bins.fingerprint
    if there != here:
        run.world.say(f"warning: the data ({here}) is not the checkpoint's ({there})")


def past(path, state):
    """What the run folder of the checkpoint at path, with content state, says of the steps up to it.

    A dict: `config` and `facts`, as its config.json and run.json were, and `records`, all those of its metrics.jsonl.
    """
    folder, step = Path(path).parent, state["step"]
    facts = {"segments": []} | (read_json(folder / run_files.FACTS) or {})
    facts["segments"] = [segment for segment in facts["segments"] if segment.get("step", 0) <= step]
    facts.pop("wandb_id", None)  # a branch is a group of its own
    return {"config": state["config"], "facts": facts, "records": run_files.read_metrics(folder)}


def save(run, is_best=False):
    """Write ckpt.pt, which best.pt and the checkpoint of a step in save_steps stand for, too, where that is due."""
    weights = distributed.gather_full_state_dict(run.model.state_dict())
    optimizer = distributed.gather_full_state_dict(run.optimizer.state_dict())
    if run.world.rank:
        return
    run.links = [run_files.BEST] if is_best else []
    run.links += [f"step_{run.step:06d}.pt"] if run.step in run.cfg.save_steps else []
    checkpoint.save(
        run.folder / run_files.CHECKPOINT,
        links=run.links,
        model=weights,
        model_config=dataclasses.asdict(run.model.config),
        optimizer=optimizer,
        scaler=run.scaler.state_dict(),
        step=run.step,
        rng=devices.random_state(run.device),
        best_val_loss=run.best_val_loss,
        config=dataclasses.asdict(run.cfg),
        data_fingerprint=run.bins.fingerprint,
        train_seconds=run.train_seconds,
        wall_seconds=time.perf_counter() - run.started,
    )
    make_links(run)


def make_links(run):
    """Have the names in run.links stand for ckpt.pt, too; again on resume, should a kill have come between."""
    for name in run.links if run.world.rank == 0 else ():
        link(run.folder / run_files.CHECKPOINT, name)
