"""Labels and notes, edited in a dialog. Others may write the same meanwhile: nothing is lost silently."""

import streamlit as st

from sae.errors import UserError
from viewer.app.shell import plain
from viewer.features import Feature

LONGEST_LABEL, LONGEST_NOTES = 200, 10_000
_FIELDS = ("label", "notes")
_OPEN, _SEEN = "labels open", "labels seen"


def begin(feature: Feature) -> None:
    """Opens the dialog of a feature with what is there now. For a button's callback."""
    now = _now(feature)
    # what this person saw when the dialog opened: only what they changed since is written
    st.session_state.update({_OPEN: _key(feature), _SEEN: now} | {f"edit_{f}": now[f] for f in _FIELDS})


def dialog(feature: Feature) -> None:
    """Draws the dialog where it is open for this feature."""
    if st.session_state.get(_OPEN) == _key(feature):
        _edit(feature)


def _end() -> None:
    st.session_state.pop(_OPEN, None)


@st.dialog("Label and notes", on_dismiss=_end)
def _edit(feature: Feature) -> None:
    with st.form("edit", border=False):
        st.text_input("Label", key="edit_label", max_chars=LONGEST_LABEL, placeholder=feature.automatic_label)
        st.text_area("Notes", key="edit_notes", max_chars=LONGEST_NOTES, height=160)
        pressed = st.form_submit_button("Save", type="primary", shortcut="Ctrl+Enter")
    st.caption("Kept in the run folder. An empty label brings back the automatic one.")
    if not pressed:
        return
    seen, now = st.session_state[_SEEN], _now(feature)
    wanted = {field: str(st.session_state[f"edit_{field}"] or "").strip() for field in _FIELDS}
    changed = [field for field in _FIELDS if wanted[field] != seen[field]]
    crossed = [field for field in changed if now[field] not in (seen[field], wanted[field])]
    for field in crossed:
        theirs = repr(now[field]) if now[field] else "nothing"
        st.warning(plain(f"Meanwhile someone made this {field} {theirs}. Save again to put yours there."))
    if crossed:
        # the others stay as they were seen, so that boxes nobody touched here write nothing
        st.session_state[_SEEN] = seen | {field: now[field] for field in crossed}
        return
    try:
        for field in changed:
            setattr(feature, field, wanted[field])
    except UserError as error:
        st.error(plain(str(error)))
        return
    _end()
    st.rerun()


def _key(feature: Feature) -> str:
    return f"{feature.site.index.home}/{feature.site.name}/{feature.latent}"


def _now(feature: Feature) -> dict[str, str]:
    return {"label": feature.label if feature.label_source == "yours" else "", "notes": feature.notes}
