"""The report of reproduce.py: what each part found, the one that was finished last first."""

from engine.files import read_json, write_text
from studies import arms, page, reproduction, writing

TITLES = {
    "works": "What works on this device",
    "speed": "Speed",
    "table_2": "Table 2 and what belongs to it",
    "section_5_1": "Section 5.1: is the change of basis linear?",
}  # of the parts, in the order in which they are worked through


def write(folder, state, plan):
    """Write report.md and report.html into the folder (a Path) of a reproduction, from its state and its Plan."""
    content = [page.Heading("The paper at the budget at hand", level=1)]
    content += reproduction.plan_table(plan, state["speed"]["training"], state["device"])
    parts = state["parts"]
    for part in sorted(parts, key=lambda name: -parts[name]["finished"]):
        content += [page.Heading(TITLES[part]), *PAGES[part](folder, parts[part])]
    missing = [part for part in TITLES if part not in parts]
    if missing:
        content.append(page.Paragraph(f"Not finished yet: {', '.join(missing)}. Repeat the command to go on."))
    content += [page.Heading("The paper's own protocol"), page.Items(reproduction.paper_days())]
    write_text(folder / "report.md", page.markdown(content))
    write_text(folder / "report.html", page.web_page(content, "The paper at the budget at hand", folder))


def _works(folder, found):
    """The table of what was tried, and what was not."""
    columns = ["trains", "evaluates", "decodes", "resumes"]
    rows = [[name, *(row.get(column, "–") for column in columns)] for name, row in found["rows"].items()]
    parts = [page.Table(["architecture", *columns], rows, words=("architecture", *columns))]
    if len(rows) < found["all"]:
        parts.append(page.Paragraph(f"{found['all'] - len(rows)} of {found['all']} were not tried: the time was over."))
    return parts


def _speed(folder, found):
    """The table of bench.py."""
    return [page.Code(found["table"])] if found["table"] else [page.Paragraph("It did not finish: see speed.log.")]


def _table_2(folder, found):
    """Each study's verdicts, table and figure; the columns beside the paper's."""
    parts, losses = [], {}
    for name in found["studies"]:
        own, table, headlines = writing.write(arms.load([str(folder / name)]), folder / name / "report")
        parts += [page.Heading(name, level=3), page.Items(headlines), table]
        if (own / "loss.png").exists():
            figure = folder / f"{name}-loss.png"
            figure.write_bytes((own / "loss.png").read_bytes())
            parts.append(page.Figure(figure.name, f"Loss during training in {name}."))
        for path in sorted((folder / name).glob("*/seed*/summary.json")):
            arm = path.parent.parent.name
            if arm in reproduction.COLUMNS:
                losses.setdefault(arm, {})[path.parent.name] = read_json(path)
    means = {
        arm: (sum(s["val_loss"] for s in own.values()) / len(own), next(iter(own.values()))["tokens"], len(own))
        for arm, own in losses.items()
    }
    return [reproduction.beside_the_paper(means), *parts]


def _section_5_1(folder, found):
    """The experiment's own table and figures."""
    own = folder / "transfer"
    parts = [page.Paragraph(f"{found['steps']:,} steps; the paper has 20,000.")]
    for path in sorted(own.glob("*.md")):
        parts.append(page.Code(path.read_text(encoding="utf-8").strip()))
    for path in sorted(own.glob("*.png")):
        copy = folder / f"section_5_1-{path.name}"
        copy.write_bytes(path.read_bytes())
        parts.append(page.Figure(copy.name, f"Section 5.1: {path.stem}."))
    return parts


PAGES = {"works": _works, "speed": _speed, "table_2": _table_2, "section_5_1": _section_5_1}
