"""FlexIP outside ComfyUI. Each module needs the library it is named after."""
