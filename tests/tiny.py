"""Real diffusers pipelines, small enough for CPU: random weights, the same every time, and nothing is fetched."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    IFSuperResolutionPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PriorTransformer,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    UVit2DModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.token_transformer import TokenTransformer

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


SIMPLE_ATTENTION: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
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


def controlnet(unet: Any) -> ControlNetModel:
    """One for such a UNet, whose way out is not of zeros, as it would begin."""
    torch.manual_seed(1)
    made: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    for layer in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return made.eval()


def ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights for such a UNet, in the two halves that diffusers reads."""
    torch.manual_seed(1)
    words = 4
    seen = {"proj.weight": torch.randn(words * WIDTH, WIDTH) / 4, "proj.bias": torch.zeros(words * WIDTH)}
    seen |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    crossing = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    attended = dict[str, torch.Tensor]()
    for i, name in enumerate(crossing):
        inner, width = unet.get_submodule(name).to_k.weight.shape
        attended |= {f"{2 * i + 1}.to_{it}_ip.weight": torch.randn(inner, width) / 4 for it in ("k", "v")}
    return {"image_proj": seen, "ip_adapter": attended}


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


def wan() -> DiffusionPipeline:
    torch.manual_seed(0)
    return quiet(
        WanPipeline(
            transformer=WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=WIDTH,
                freq_dim=64,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            ).eval(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
            ),
            vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def ltx() -> DiffusionPipeline:
    torch.manual_seed(0)
    return quiet(
        LTXPipeline(
            transformer=LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=8,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=WIDTH,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1, 1),
                spatio_temporal_scaling=(True, True, False, False),
                decoder_spatio_temporal_scaling=(True, True, False, False),
                decoder_inject_noise=(False, False, False, False, False),
                upsample_residual=(False, False, False, False),
                upsample_factor=(1, 1, 1, 1),
                timestep_conditioning=True,
                patch_size=1,
                patch_size_t=1,
                encoder_causal=True,
                decoder_causal=False,
            ).eval(),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def upscaler() -> DiffusionPipeline:
    torch.manual_seed(0)
    noise = {name: value for name, value in STABLE_DIFFUSION_NOISE.items() if name != "steps_offset"}
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **STABLE_DIFFUSION_NOISE)
    return quiet(
        StableDiffusionUpscalePipeline(
            vae=autoencoder(),
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(),
            unet=unet(in_channels=7, cross_attention_dim=WIDTH, num_class_embeds=1000),
            low_res_scheduler=DDPMScheduler(**noise),
            scheduler=scheduler,
            max_noise_level=350,
        )
    )


def amused() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=WIDTH,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=WIDTH,
        vocab_size=32,
        codebook_size=24,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
    ).eval()
    tokens = VQModel(
        block_out_channels=(32,),
        latent_channels=32,
        layers_per_block=2,
        num_vq_embeddings=32,
        sample_size=32,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    ).eval()
    return quiet(
        AmusedPipeline(
            transformer=transformer,
            scheduler=AmusedScheduler(mask_token_id=31),
            vqvae=tokens,
            text_encoder=clip_text(CLIPTextModelWithProjection),
            tokenizer=clip_tokenizer(),
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


def autoregressive(crosses: bool) -> dict[str, Any]:
    """The parts of a model of codes: 4 × 4 of 16 of them, of 16 pixels."""
    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    shape: dict[str, Any] = {"words": TOKENS, "codes": 16, "length": 16}
    shape |= {"width": 32, "layers": 2, "intermediate_size": 64}
    told = {"context_width": WIDTH} if crosses else {"vocabulary": len(clip_tokenizer())}
    writer: Any = TokenTransformer(**shape, **told)
    for parameter in writer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    parts = {"writer": writer.eval(), "vq": vq.eval(), "tokenizer": clip_tokenizer()}
    return parts | ({"text_encoder": clip_text()} if crosses else {})


def deepfloyd() -> tuple[DiffusionPipeline, DiffusionPipeline]:
    torch.manual_seed(0)
    noise: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    limits: dict[str, Any] = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}

    def net(channels: int, size: int, **config: Any) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=size,
            layers_per_block=1,
            block_out_channels=(32, 64),
            in_channels=channels,
            out_channels=6,
            **SIMPLE_ATTENTION,
            cross_attention_dim=WIDTH,
            encoder_hid_dim=WIDTH,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            act_fn="gelu",
            norm_num_groups=8,
            **config,
        ).eval()

    def scheduler() -> DDPMScheduler:
        return DDPMScheduler(**noise, **limits, variance_type="learned_range")

    rest: dict[str, Any] = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5(),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    base = IFPipeline(unet=net(3, 16), scheduler=scheduler(), **rest)
    upsampler = IFSuperResolutionPipeline(
        unet=net(6, 32, class_embed_type="timestep"),
        scheduler=scheduler(),
        image_noising_scheduler=DDPMScheduler(**noise),
        **rest,
    )
    return quiet(base), quiet(upsampler)


def dit() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    ).eval()
    labels = {0: "tench, Tinca tinca", 1: "goldfish", 2: "white shark, man-eater"}
    return quiet(DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=DDIMScheduler(), id2label=labels))


def prior() -> PriorTransformer:
    """With a deviation that is not nought, as it is by default: it would say the same of everything."""
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=16, embedding_dim=WIDTH, num_layers=1).eval()
    model.clip_std.data.fill_(1.0)
    model.clip_mean.data.normal_()
    return model


def unclip_scheduler(kind: str, predicts: str, **config: Any) -> UnCLIPScheduler:
    return UnCLIPScheduler(variance_type=kind, prediction_type=predicts, num_train_timesteps=1000, **config)


def kandinsky() -> tuple[DiffusionPipeline, DiffusionPipeline]:
    torch.manual_seed(0)
    first = KandinskyV22PriorPipeline(
        prior=prior(),
        image_encoder=clip_vision(),
        text_encoder=clip_text(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        scheduler=unclip_scheduler("fixed_small_log", "sample", clip_sample_range=5.0),
    )
    decoder = KandinskyV22Pipeline(
        unet=UNet2DConditionModel(
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            block_out_channels=(32, 64),
            layers_per_block=1,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
            sample_size=16,
            **SIMPLE_ATTENTION,
        ).eval(),
        movq=VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ).eval(),
        scheduler=DDIMScheduler(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
        ),
    )
    return quiet(first), quiet(decoder)


def karlo() -> DiffusionPipeline:
    torch.manual_seed(0)

    def enlarger() -> UNet2DModel:
        return UNet2DModel(
            sample_size=32,
            layers_per_block=1,
            in_channels=6,
            out_channels=3,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            resnet_time_scale_shift="scale_shift",
        ).eval()

    decoder = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        class_embed_type="identity",
        norm_num_groups=8,
        **SIMPLE_ATTENTION,
    ).eval()
    return quiet(
        UnCLIPPipeline(
            prior=prior(),
            prior_scheduler=unclip_scheduler("fixed_small_log", "sample", clip_sample_range=5.0),
            decoder=decoder,
            text_encoder=clip_text(CLIPTextModelWithProjection),
            tokenizer=clip_tokenizer(),
            text_proj=UnCLIPTextProjModel(
                clip_extra_context_tokens=4, clip_embeddings_dim=WIDTH, time_embed_dim=128, cross_attention_dim=WIDTH
            ).eval(),
            super_res_first=enlarger(),
            super_res_last=enlarger(),
            decoder_scheduler=unclip_scheduler("learned_range", "epsilon"),
            super_res_scheduler=unclip_scheduler("fixed_small_log", "epsilon"),
        )
    )


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


def clip_vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return CLIPVisionModelWithProjection(config).eval()


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
