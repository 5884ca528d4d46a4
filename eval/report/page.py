"""Pages made from templates: whatever they show is escaped."""

from __future__ import annotations

from pathlib import Path

from rsd_trt.errors import missing_extra
from rsd_trt.eval.report import markdown, wording

TEMPLATES = Path(__file__).with_name("templates")


def check_templates() -> None:
    """Raises UserError unless pages can be made: to be called before what they show is measured."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise missing_extra("jinja2", "report") from None


def render(template: str, page: object) -> str:
    """The page through a template; whatever it shows is escaped for HTML, or for Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    html = template.endswith(".html.jinja")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=None if html else markdown.text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"table": markdown.table, "code": markdown.code}
    return environment.get_template(template).render(page=page, words=wording)
