"""Which options of a model go together."""

import functools
import math
import typing


@functools.cache
def _choices(schema):
    """name -> the values that it may have, for each field of a dataclass that is a Literal."""
    hints = typing.get_type_hints(schema).items()
    return {name: typing.get_args(kind) for name, kind in hints if typing.get_origin(kind) is typing.Literal}


def check(config):
    """Raise ValueError, naming the fields and what would be valid, for a GPTConfig that cannot be built."""
    positive = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_ratio", "n_expert_active")
    for name in (*positive, "attn_scale", "load_balance", "n_expert", "query_rotation", "wq_identity_from"):
        value = getattr(config, name)
        if not (0 < value < math.inf or (value == 0 and name not in positive)):  # nan is neither
            raise ValueError(f"{name} must be {'positive' if name in positive else 'zero or positive'}, got {value}")
    for name, choices in _choices(type(config)).items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {config.dropout}")
    if config.n_embd % config.n_head:
        lower = config.n_embd - config.n_embd % config.n_head
        near = " or ".join(str(width) for width in (lower, lower + config.n_head) if width)
        raise ValueError(
            f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads: make n_embd a multiple of "
            f"{config.n_head}, such as {near}"
        )
    if abs(config.mlp_ratio * config.n_embd - config.mlp_hidden) > 1e-9 * config.mlp_hidden:  # but for rounding
        raise ValueError(
            f"mlp_ratio={config.mlp_ratio} times n_embd={config.n_embd} is not a whole hidden width: make mlp_ratio a "
            f"multiple of 1/{config.n_embd}, such as {round(config.mlp_ratio * config.n_embd)}/{config.n_embd}"
        )
    if config.n_kv_head is not None and (config.n_kv_head < 1 or config.n_head % config.n_kv_head):
        divisors = [str(n) for n in range(1, config.n_head + 1) if config.n_head % n == 0]
        raise ValueError(
            f"n_kv_head={config.n_kv_head} must divide n_head={config.n_head}: use one of {', '.join(divisors)}"
        )
    if config.n_kv_head not in (None, config.n_head) and (config.wk_identity or config.wv_identity):
        raise ValueError(
            f"wk_identity and wv_identity need n_kv_head=n_head={config.n_head}, not {config.n_kv_head}: with fewer "
            "heads keys and values are narrower than the block's input, which cannot take their place"
        )
    if config.wq_identity and config.wk_identity and config.wv_identity:
        raise ValueError("wq_identity, wk_identity and wv_identity leave attention nothing to learn: set at most two")
    _check_queries(config)
    if config.pos == "rope" and config.d_k % 2:
        raise ValueError(
            f"pos=rope rotates pairs: n_embd/n_head must be even, got {config.n_embd}/{config.n_head} = {config.d_k}"
        )
    if config.parallel and config.attn_skip != config.mlp_skip:
        raise ValueError("parallel=True has one skip connection: set attn_skip and mlp_skip both to True or to False")
    if config.n_expert and config.activation == "swiglu":
        raise ValueError(f"activation=swiglu is that of a plain MLP, got n_expert={config.n_expert}: set n_expert=0")
    if config.n_expert and not config.n_expert_active <= config.n_expert:
        raise ValueError(
            f"n_expert_active={config.n_expert_active} must not exceed n_expert={config.n_expert} (0: a plain MLP)"
        )


def _check_queries(config):
    """`check` for the options of queries, and for those that change keys and values with them."""
    for name in ("query_residual", "query_rotation", "wq_identity_from"):
        if getattr(config, name) and not config.wq_identity:
            raise ValueError(f"{name}={getattr(config, name)} is a choice beside W_Q = I: set wq_identity=True, too")
    if config.query_residual not in (None, "linear", "mlp"):
        raise ValueError(f"query_residual must be linear, mlp or none, got {config.query_residual!r}")
    if config.query_residual and config.query_rotation:
        raise ValueError("query_residual and query_rotation are two kinds of queries: set one of the two")
    if config.wq_identity_from >= config.n_layer or (config.wq_identity_from and config.share_layers):
        raise ValueError(
            f"wq_identity_from={config.wq_identity_from} must be below n_layer={config.n_layer}, and 0 with "
            "share_layers=True, where all layers have the same weights"
        )
    if config.share_kv and (config.wk_identity or config.wv_identity):
        raise ValueError("share_kv=True makes W_V of W_K: set neither wk_identity nor wv_identity")
    if config.attn_logit_std is not None:
        is_number = isinstance(config.attn_logit_std, (int, float))
        if config.attn_logit_std not in ("paper", "small") and not (is_number and 0 < config.attn_logit_std < math.inf):
            raise ValueError(f"attn_logit_std must be positive, paper, small or none, got {config.attn_logit_std}")
        if config.norm not in ("layernorm", "rmsnorm"):
            raise ValueError(
                f"attn_logit_std needs norm=layernorm or rmsnorm, got norm={config.norm}: without a normalised input "
                "the logits have no known standard deviation; set attn_scale"
            )
