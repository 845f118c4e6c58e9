"""The Streamlit app: `launch` serves `main`, whose pages are in `pages`."""
