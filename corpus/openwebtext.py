"""Which OpenWebText is meant, and how many documents and tokens it has."""

SOURCE = ("Skylion007/openwebtext", "plain_text", "79d93d786212f7344586290adb811d4ae6a1762c")  # id, subset, revision
NANOGPT_SPLIT = {"seed": 2357, "val_fraction": 0.0005}
COUNTS = {"documents": 8_013_769, "tokens": 9_040_017_095}  # GPT-2 tokens, end-of-text included
SPLIT_COUNTS = {  # with nanoGPT's split
    "train": {"documents": 8_009_762, "tokens": 9_035_582_489},
    "val": {"documents": 4_007, "tokens": 4_434_606},
}


def check_counts(folder, manifest):
    """Compare the counts in a manifest of OpenWebText with the known ones; does nothing for other sources.

    Raises ValueError when they differ.
    """
    source, splits = manifest["source"], manifest["splits"]
    identity = (source.get("id"), source.get("subset"), source.get("revision"))
    if identity != SOURCE or source["text_column"] != "text":
        return
    found = {"all": {name: sum(splits[part][name] for part in splits) for name in ("documents", "tokens")}} | splits
    known = {"all": COUNTS} | (SPLIT_COUNTS if manifest["split"] == NANOGPT_SPLIT else {})
    compared = ("documents", "tokens") if manifest["tokenizer"] == "gpt2" else ("documents",)
    wrong = [
        f"{part}: {found[part][name]:,} {name}, not {known[part][name]:,}"
        for part in known
        for name in compared
        if found[part][name] != known[part][name]
    ]
    if wrong:
        raise ValueError(
            f"{folder} is written, but it is not OpenWebText as known ({'; '.join(wrong)}), so results on it are not "
            "comparable with others'; meta.json has the versions of the libraries that made it"
        )
    print(f"checked: the numbers of {' and '.join(compared)} are those known for this revision of OpenWebText")
