"""Labels and notes, edited in a dialog. Others may write the same meanwhile: nothing is lost silently."""

import streamlit as st

from sae.errors import UserError
from viewer.app.shell import plain
from viewer.features import Feature

LONGEST_LABEL, LONGEST_NOTES = 200, 10_000
_FIELDS = ("label", "notes")


def begin() -> None:
    """Forgets what an earlier dialog showed. For the button that opens one."""
    st.session_state.pop("editing", None)


@st.dialog("Label and notes")
def edit(feature: Feature) -> None:
    """Two boxes and what is there now."""
    key = f"{feature.site.index.home}/{feature.site.name}/{feature.latent}"
    now = _now(feature)
    # what this person saw when the dialog opened: only what they changed since is written
    if st.session_state.get("editing") != key:
        st.session_state.update(editing=key, seen=now, **{f"edit_{field}": now[field] for field in _FIELDS})
    seen = st.session_state["seen"]
    with st.form("edit", border=False):
        st.text_input("Label", key="edit_label", max_chars=LONGEST_LABEL, placeholder=feature.automatic_label)
        st.text_area("Notes", key="edit_notes", max_chars=LONGEST_NOTES, height=160)
        pressed = st.form_submit_button("Save", type="primary", shortcut="Ctrl+Enter")
    st.caption("Kept in the run folder. An empty label brings back the automatic one.")
    if not pressed:
        return
    wanted = {field: str(st.session_state[f"edit_{field}"] or "").strip() for field in _FIELDS}
    changed = [field for field in _FIELDS if wanted[field] != seen[field]]
    crossed = [field for field in changed if now[field] not in (seen[field], wanted[field])]
    if crossed:
        for field in crossed:
            st.warning(
                plain(f"Meanwhile someone wrote this {field}: {now[field]!r}. Save again to put yours there.")
            )
        st.session_state["seen"] = now
        return
    try:
        for field in changed:
            setattr(feature, field, wanted[field])
    except UserError as error:
        st.error(plain(str(error)))
        return
    del st.session_state["editing"]
    st.rerun()


def _now(feature: Feature) -> dict[str, str]:
    return {"label": feature.label if feature.label_source == "yours" else "", "notes": feature.notes}
