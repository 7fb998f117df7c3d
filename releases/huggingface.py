"""Our ViTs as models of Hugging Face transformers: config.json, names and layouts of the weights.

The names are those of the files on its hub, which transformers 4 loads as they are and version 5
renames while it loads them.
"""
import re

# (pattern, replacement) for names of `ViT.state_dict()`, applied one after the other
EMBEDDINGS = (
    (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"))
ATTENTION = (
    (r"^blocks", "encoder.layer"),
    (r"attn\.(query|key|value)", r"attention.attention.\1"),
    (r"attn\.proj", "attention.output.dense"))
SCALE = (
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),)

VIT = (
    *EMBEDDINGS, *ATTENTION,
    (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"),
    (r"\.norm1", ".layernorm_before"), (r"\.norm2", ".layernorm_after"), (r"^norm", "layernorm"))
DINOV2 = (
    *EMBEDDINGS, *ATTENTION, *SCALE,
    (r"mlp\.w12", "mlp.weights_in"), (r"mlp\.w3", "mlp.weights_out"), (r"^norm", "layernorm"))
DINOV3 = (
    (r"^(cls_token|mask_token)", r"embeddings.\1"),
    (r"^storage_tokens", "embeddings.register_tokens"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
    (r"^blocks", "layer"), *SCALE,
    (r"attn\.(q|k|v)(uery|ey|alue)", r"attention.\1_proj"), (r"attn\.proj", "attention.o_proj"),
    (r"mlp\.w1", "mlp.gate_proj"), (r"mlp\.(w2|fc1)", "mlp.up_proj"),
    (r"mlp\.(w3|fc2)", "mlp.down_proj"))
CLIP = (
    (r"^proj$", "visual_projection.weight"),
    (r"^(cls_token|pos_embed|patch_embed|blocks|norm)", r"vision_model.\1"),
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding.weight"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"norm_pre", "pre_layrnorm"), (r"\.norm\.", ".post_layernorm."),  # sic: pre_layrnorm
    (r"blocks", "encoder.layers"), (r"norm([12])", r"layer_norm\1"),
    (r"attn\.(q|k|v)(uery|ey|alue)", r"self_attn.\1_proj"), (r"attn\.proj", "self_attn.out_proj"))

MODELS = {  # model_type: class and names
    "vit": ("ViTModel", VIT),
    "dinov2": ("Dinov2Model", DINOV2),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", DINOV2),
    "dinov3_vit": ("DINOv3ViTModel", DINOV3),
    "clip_vision_model": ("CLIPVisionModelWithProjection", CLIP),
}


def has_model(row):
    """Whether transformers has a network that gives the features of this row of models.ENCODERS.

    MaskCLIP has CLIP's weights, but CLIP's network would give other features.
    """
    return row.network.FAMILY == "ViT" and "projected" not in row.network.FEATURES


def model_type(encoder):
    """The type of the transformers model that computes what a ViT encoder does."""
    vit = encoder.row.arguments
    if vit.get("clip"):
        return "clip_vision_model"
    if encoder.backbone.grid is None:  # positions are rotated in, not added
        return "dinov3_vit"
    if not vit.get("layer_scale"):
        return "vit"
    return "dinov2_with_registers" if vit.get("registers") else "dinov2"


def config(encoder):
    """The content of config.json for a ViT encoder."""
    row = encoder.row
    vit = row.arguments
    kind = model_type(encoder)
    content = {
        "model_type": kind, "architectures": [MODELS[kind][0]], "patch_size": row.patch_size,
        "hidden_size": vit["dim"], "num_hidden_layers": vit["depth"],
        "num_attention_heads": vit["heads"], "layer_norm_eps": encoder.backbone.norm.eps}
    if encoder.backbone.grid:
        h, w = (row.patch_size * side for side in encoder.backbone.grid)
        content["image_size"] = h if h == w else [h, w]
    if vit.get("registers"):
        content["num_register_tokens"] = vit["registers"][1]

    # The MLP, whose width transformers derives itself for DINOv2
    gated = vit.get("mlp", "gelu").startswith("swiglu")
    if kind.startswith("dinov2"):
        return content | {"use_swiglu_ffn": gated}
    content["intermediate_size"] = vit.get("hidden", 4 * vit["dim"])
    if kind == "dinov3_vit":
        content |= {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    if kind == "clip_vision_model":
        content |= {"hidden_act": "quick_gelu", "projection_dim": 512}
    return content


def weights(encoder):
    """A ViT encoder's weights in the transformers model's names and layouts.

    Returns a state dict that shares the encoder's memory.
    """
    kind = model_type(encoder)

    # Queries, keys and values are one layer here and three there
    ours = {}
    for name, value in encoder.backbone.state_dict().items():
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                ours[name.replace("qkv", part)] = rows
        else:
            ours[name] = value

    if kind == "dinov3_vit":
        # transformers computes the periods, and has no bias of the keys: our mask takes it out
        absent = re.compile(r"^rope_embed|bias_mask$|key\.bias$")
        ours = {name: value for name, value in ours.items() if not absent.search(name)}
        ours["mask_token"] = ours["mask_token"].unsqueeze(0)
    if kind == "clip_vision_model":
        ours["cls_token"] = ours["cls_token"][0, 0]
        ours["pos_embed"] = ours["pos_embed"][0]
        ours["proj"] = ours["proj"].T

    state = {}
    for name, value in ours.items():
        for pattern, replacement in MODELS[kind][1]:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    return state
