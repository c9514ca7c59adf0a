"""Real diffusers pipelines, small enough for CPU: random weights, the same every time, and nothing is fetched."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 32  # of text embeddings
TOKENS = 77
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CLIP_VOCABULARY = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
BERT_VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
]
T5_VOCABULARY = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
STABLE_DIFFUSION_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def stable_diffusion(in_channels: int = 4, cls: Any = StableDiffusionPipeline) -> DiffusionPipeline:
    """Nine channels are those of an inpainting UNet: latents, mask, masked latents."""
    torch.manual_seed(0)
    return quiet(
        cls(
            vae=autoencoder(),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(),
            unet=unet(in_channels=in_channels, cross_attention_dim=WIDTH),
            scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **STABLE_DIFFUSION_NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl() -> DiffusionPipeline:
    torch.manual_seed(0)
    scheduler: Any = EulerDiscreteScheduler(timestep_spacing="leading", **STABLE_DIFFUSION_NOISE)
    time_ids, time_width = 6, 8  # original size, crop and target size, each number embedded
    return quiet(
        StableDiffusionXLPipeline(
            vae=autoencoder(force_upcast=False),
            text_encoder=clip_text(),
            text_encoder_2=clip_text(CLIPTextModelWithProjection),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=time_width,
                projection_class_embeddings_input_dim=time_ids * time_width + WIDTH,
            ),
            scheduler=scheduler,
        )
    )


def sd3() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,  # heads times their width
        joint_attention_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
    )
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=clip_text(CLIPTextModelWithProjection, width=WIDTH // 2),
            text_encoder_2=clip_text(CLIPTextModelWithProjection, width=WIDTH // 2),
            text_encoder_3=t5(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=t5_tokenizer(),
        )
    )


def flux() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # four latent channels, two by two
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return quiet(
        FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=clip_text(),
            text_encoder_2=t5(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=t5_tokenizer(),
        )
    )


def cascade(known: bool = True) -> dict[str, Any]:
    """The parts of a pixel model: 16 pixels, enlarged to 32, in patches of two."""
    torch.manual_seed(0)
    colours = 3 * 4
    base = unet(
        in_channels=2 * colours + 4 if known else colours, cross_attention_dim=WIDTH, sample_size=8, out=colours
    )
    upsampler = UNet2DModel(
        sample_size=16,
        in_channels=2 * colours,
        out_channels=colours,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        class_embed_type="timestep",
    )
    return {
        "base": base,
        "upsampler": upsampler.eval(),
        "text_encoder": clip_text() if known else bert(),
        "tokenizer": clip_tokenizer() if known else bert_tokenizer(),
        "scheduler": DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **STABLE_DIFFUSION_NOISE),
    }


def bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=len(BERT_VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
        ),
        add_pooling_layer=False,
    ).eval()


def bert_tokenizer() -> BertTokenizer:
    vocabulary = {token: number for number, token in enumerate(BERT_VOCABULARY)}
    return BertTokenizer(vocab=vocabulary, model_max_length=TOKENS)


def save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def autoencoder(**config: Any) -> AutoencoderKL:
    """Four latent channels, two pixels to a latent."""
    levels: dict[str, Any] = {  # diffusers declares tuples of one
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(
        latent_channels=4, layers_per_block=1, norm_num_groups=8, sample_size=32, **levels, **config
    ).eval()


def unet(in_channels: int = 4, out: int = 4, sample_size: int = 16, **config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=out,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        **config,
    ).eval()


def clip_text(cls: Any = CLIPTextModel, width: int = WIDTH) -> Any:
    start, end = len(CLIP_VOCABULARY) - 2, len(CLIP_VOCABULARY) - 1
    return cls(
        CLIPTextConfig(
            vocab_size=len(CLIP_VOCABULARY),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    ).eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes, and bytes that end a word: no merges."""
    vocabulary = {token: number for number, token in enumerate(CLIP_VOCABULARY)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=128,
            d_model=WIDTH,
            d_kv=8,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def t5_tokenizer() -> T5Tokenizer:
    """Characters; the scores make a space likelier than a letter."""
    scores = [0.0, 0.0, 0.0, -2.0] + [-3.0] * (len(T5_VOCABULARY) - 4)
    return T5Tokenizer(vocab=list(zip(T5_VOCABULARY, scores, strict=True)), extra_ids=0, model_max_length=TOKENS)
