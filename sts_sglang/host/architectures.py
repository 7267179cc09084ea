"""Every architecture of SGLang's model registry, in either release: served, or why it is not.

Served is what was read in sglang/srt/models and seen to run: every layer is one RadixAttention over all
cached tokens, with the pool of keys and values that `sts` reads, without window, sink, soft cap or bias.
Being a list, it keeps out what is not on it. Where a field of a model's configuration says otherwise,
host/serves.py refuses that model, and host/bind.py looks at the layers themselves once they are made.

tests/test_architectures.py compares these names with the registry of the release at hand, and serves a tiny
model of each.
"""

from __future__ import annotations

from sts_sglang import checkpoints
from sts_sglang.host.releases import release

# What the newer release alone has.
_NEWER = """
    BailingMM2NativeForConditionalGeneration BailingMMNativeForConditionalGeneration BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration BeamForCausalLM Cosmos3EdgeForConditionalGeneration
    Cosmos3ForConditionalGeneration DFlash2BeamDraftModel DFlash2DraftModel DSparkDraftModel
    DSparkMiniMaxDraftModel DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM Dots3NoteForCausalLMNextN
    EmbeddingGemma2Model EmbeddingGemmaModel ExaoneMoeForCausalLM FalconMambaForCausalLM
    GigaChat35ForCausalLM GigaChat35ForCausalLMNextN Glm5NextForConditionalGeneration
    Glm5NextForConditionalGenerationNextN GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
    GraniteSWAForCausalLM HYV4ForCausalLM HYV4ForCausalLMNextN IQuestQ1ForCausalLM IQuestQ1MTP
    InternS2MobiusForConditionalGeneration K2HorizonForCausalLM KimiK3ForConditionalGeneration
    KimiK3LinearForCausalLM Lfm2BidirectionalModel Lfm2DSparkDraftModel LiLiCorrDraftModel LingDSparkModel
    Mamba2ForCausalLM MambaForCausalLM MiniCPMSALAForCausalLM MiniCPMV4_7ForConditionalGeneration
    MiniMaxDFlash2DraftModel MuseGlimmerAssistantModel MuseGlimmerForCausalLM
    MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration NanbeigeForCausalLM
    NanbeigeForSequenceClassification NemotronH_Omni_Reasoning_V3 Qwen3Model Qwen3_5ForCausalLM
    Qwen3_5MoeForCausalLM Qwen4ExpForCausalLMMTP Qwen4ExpForConditionalGeneration Spark2_5ForCausalLM
    XllmForCausalLM
    """


# Their queries, where they are normed (`use_qk_norm`), have a row a head. SGLang takes rows beyond the number
# of tokens for padding and drops them: the older release in prefill graphs, the newer one in every prefill.
ROW_A_HEAD = frozenset({"HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"})


def _names(text: str) -> frozenset[str]:
    """Those that this release has: in the older one transformers would run a newer one in SGLang's place."""
    absent = "" if release.HAS_NEWER_MODELS else _NEWER
    return frozenset(text.split()) - frozenset(absent.split())


def _served(text: str) -> frozenset[str]:
    return _names(text) - (ROW_A_HEAD if release.HAS_NEWER_MODELS else frozenset())


DENSE = _served(
    """
    ApertusForCausalLM ArceeForCausalLM ChatGLMModel CohereForCausalLM Ernie4_5_ForCausalLM
    ExaoneForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GemmaForCausalLM Glm4ForCausalLM
    GraniteForCausalLM HunYuanDenseV1ForCausalLM IQuestCoderForCausalLM InternLM2ForCausalLM
    InternLM3ForCausalLM LlamaForCausalLM MiMoForCausalLM MiniCPMForCausalLM Ministral3ForCausalLM
    MistralForCausalLM OPTForCausalLM Olmo2ForCausalLM OlmoForCausalLM OrionForCausalLM PersimmonForCausalLM
    Phi3ForCausalLM PhiForCausalLM QWenLMHeadModel Qwen2ForCausalLM Qwen3ForCausalLM StableLmForCausalLM
    Starcoder2ForCausalLM TeleFLMForCausalLM TorchNativeLlamaForCausalLM TorchNativePhi3ForCausalLM
    XverseForCausalLM
    """
)
# Mixtures of experts.
EXPERTS = _served(
    """
    BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM DbrxForCausalLM DeepseekForCausalLM
    Ernie4_5_MoeForCausalLM Glm4MoeForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM
    HYV3ForCausalLM HunYuanMoEV1ForCausalLM MiniMaxM2ForCausalLM MixtralForCausalLM OlmoeForCausalLM
    PhiMoEForCausalLM QuantMixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM SarvamMoEForCausalLM
    XverseMoeForCausalLM
    """
)
TARGETS = DENSE | EXPERTS
# Whose own layer for the next token but one drafts under EAGLE, and the class that SGLang makes of it: one
# layer of plain attention, from the model's own checkpoint.
OWN_LAYERS = {name: layer.made for name, layer in checkpoints.OWN_LAYERS.items()}
# Of these SGLang takes the target's own path for that, where no draft is named.
OWN_PATH = _names("Glm4MoeForCausalLM HYV3ForCausalLM")
# SGLang loads a draft of these for that layer, whatever the algorithm; Bailing's is not served.
DRAFTED_BY_A_LAYER = frozenset(OWN_LAYERS) | _names("BailingMoeForCausalLM BailingMoeV2ForCausalLM")
# Whose embeddings and logits a head of EAGLE can share (get_embed_and_head in SGLang's class; OPT's fails).
EAGLE_TARGETS = _names(
    """
    ApertusForCausalLM BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
    Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM HYV3ForCausalLM
    IQuestCoderForCausalLM InternLM3ForCausalLM LlamaForCausalLM MiMoForCausalLM MiniMaxM2ForCausalLM
    Ministral3ForCausalLM MistralForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
    Qwen3MoeForCausalLM SarvamMoEForCausalLM TeleFLMForCausalLM
    """
)
# And hand hidden states of single layers to one of EAGLE-3 (set_eagle3_layers_to_capture).
EAGLE3_TARGETS = EAGLE_TARGETS - _names(
    """
    Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM Glm4ForCausalLM HYV3ForCausalLM MiMoForCausalLM
    """
)

# An EAGLE head under STANDALONE, or a whole model under EAGLE, would load and draft nonsense.
DRAFTS = {
    "STANDALONE": TARGETS - DRAFTED_BY_A_LAYER,
    "EAGLE": _names("LlamaForCausalLMEagle MistralForCausalLMEagle Qwen2ForCausalLMEagle")
    | frozenset(OWN_LAYERS.values()),
    "EAGLE3": _names("LlamaForCausalLMEagle3"),
}
# Of the algorithms that ask a target for more than its logits.
HEADED_TARGETS = {"EAGLE": EAGLE_TARGETS, "EAGLE3": EAGLE3_TARGETS}

_REASONS = {
    "windows, chunks or sinks in some layers, as most of these models have, or as SGLang takes them all": """
    AfmoeForCausalLM BeamForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM Exaone4ForCausalLM
    ExaoneMoEForCausalLM ExaoneMoeForCausalLM Gemma3ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM
    GptOssForCausalLM GraniteMoeSWAForCausalLM GraniteSWAForCausalLM IQuestQ1ForCausalLM LagunaForCausalLM
    Llama4ForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MuseGlimmerForCausalLM
    Spark2_5ForCausalLM Step3p5ForCausalLM
    """,
    "soft caps, or biases of logits by position (ALiBi)": """
    BaichuanForCausalLM Gemma2ForCausalLM Grok1ForCausalLM Grok1ModelForCausalLM
    """,
    "attention that is block-sparse of its own": """
    MiniMaxM3SparseForCausalLM Phi3SmallForCausalLM
    """,
    "latent attention (MLA)": """
    DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
    Dots3NoteForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM HYV4ForCausalLM LongcatFlashForCausalLM
    MiniCPM3ForCausalLM MistralLarge3ForCausalLM SarvamMLAForCausalLM
    """,
    "recurrent or linear layers": """
    BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM
    GigaChat35ForCausalLM GraniteMoeHybridForCausalLM JetNemotronForCausalLM KimiK3LinearForCausalLM
    KimiLinearForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Mamba2ForCausalLM MambaForCausalLM
    MiniCPMSALAForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM Qwen3NextForCausalLM
    Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM ZayaForCausalLM
    """,
    "layers that run more than once, or have no attention of their own": """
    DeciLMForCausalLM HrmTextForCausalLM IQuestLoopCoderForCausalLM NanbeigeForCausalLM
    """,
    "diffusion: tokens are not drafted and verified": """
    DiffusionGemmaForBlockDiffusion LLaDA2MoeModelLM SDARForCausalLM SDARMoeForCausalLM
    """,
    "images, sound, or positions of several dimensions": """
    BailingMM2NativeForConditionalGeneration BailingMMNativeForConditionalGeneration
    BailingMoeV3VLForConditionalGeneration Cohere2VisionForConditionalGeneration
    Cosmos3EdgeForConditionalGeneration Cosmos3ForConditionalGeneration DeepseekOCRForCausalLM
    DeepseekVL2ForCausalLM DotsOCRForCausalLM DotsVLMForCausalLM Ernie4_5_VLMoeForConditionalGeneration
    Gemma3ForConditionalGeneration Gemma3nForConditionalGeneration Gemma4ForConditionalGeneration
    Gemma4UnifiedForConditionalGeneration Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Glm5NextForConditionalGeneration GlmAsrForConditionalGeneration GlmImageForConditionalGeneration
    GlmOcrForConditionalGeneration InklingForConditionalGeneration InternS1ForConditionalGeneration
    InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2PreviewForConditionalGeneration InternVLChatModel JetVLMForConditionalGeneration
    KimiK25ForConditionalGeneration KimiK3ForConditionalGeneration KimiVLForConditionalGeneration
    Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration Llama4ForConditionalGeneration
    LlavaForConditionalGeneration LlavaLlamaForCausalLM LlavaMistralForCausalLM LlavaQwenForCausalLM
    LlavaVidForCausalLM LocateAnythingForConditionalGeneration MiDashengLMModel MiMoV2ASRForCausalLM
    MiniCPMO MiniCPMV MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration
    MiniMaxM3SparseForConditionalGeneration Mistral3ForConditionalGeneration MllamaForConditionalGeneration
    MossVLForConditionalGeneration MultiModalityCausalLM MuseGlimmerForConditionalGeneration
    MuseSparkForConditionalGeneration NVILAForConditionalGeneration NVILALiteForConditionalGeneration
    NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3 POINTSV15ChatModel
    PaddleOCRVLForConditionalGeneration Phi4MMForCausalLM PixtralForConditionalGeneration
    Qwen2AudioForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen3ASRForConditionalGeneration Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForConditionalGeneration Sarashina2VisionForCausalLM Step3VLForConditionalGeneration
    Step3p7ForConditionalGeneration StepVLForConditionalGeneration TransformersMultiModalForCausalLM
    TransformersMultiModalMoEForCausalLM UnlimitedOCRForCausalLM VoxtralForConditionalGeneration
    WhisperForConditionalGeneration YiVLForCausalLM
    """,
    "no decoder of text: embeddings, rewards, classes": """
    BertForSequenceClassification BertModel CLIPModel Contriever EmbeddingGemma2Model EmbeddingGemmaModel
    Gemma2ForSequenceClassification InternLM2ForRewardModel Lfm2BidirectionalModel LlamaEmbeddingModel
    LlamaForClassification LlamaForSequenceClassification LlamaForSequenceClassificationWithNormal_Weights
    MistralModel NanbeigeForSequenceClassification PixtralVisionModel Qwen2ForRewardModel
    Qwen2ForSequenceClassification Qwen3ForRewardModel Qwen3ForSequenceClassification Qwen3Model
    TransformersEmbeddingModel TransformersForSequenceClassification TransformersMoEEmbeddingModel
    TransformersMoEForSequenceClassification TransformersMultiModalEmbeddingModel
    TransformersMultiModalForSequenceClassification TransformersMultiModalMoEEmbeddingModel
    TransformersMultiModalMoEForSequenceClassification XLMRobertaForSequenceClassification XLMRobertaModel
    """,
    "a draft of another kind: DFlash, DSpark, or of a model that is not served": """
    DFlash2BeamDraftModel DFlash2DraftModel DFlashDraftModel DFlashLagunaForCausalLM DSparkDraftModel
    DSparkMiniMaxDraftModel DeepseekV3ForCausalLMNextN DeepseekV4ForCausalLMDSpark DeepseekV4ForCausalLMNextN
    Dots3NoteForCausalLMNextN Eagle3DeepseekV2ForCausalLM ExaoneMoEForCausalLMMTP Gemma4AssistantForCausalLM
    Gemma4UnifiedAssistantForCausalLM GigaChat35ForCausalLMNextN Glm4MoeLiteForCausalLMNextN
    Glm5NextForConditionalGenerationNextN GlmMoeDsaForCausalLMNextN GlmOcrForConditionalGenerationNextN
    HYV4ForCausalLMNextN IQuestQ1MTP InklingForConditionalGenerationMTP Lfm2DSparkDraftModel
    LiLiCorrDraftModel LingDSparkModel LongcatFlashForCausalLMNextN MiMoV2MTP MiniMaxDFlash2DraftModel
    MistralLarge3ForCausalLMEagle MuseGlimmerAssistantModel NemotronHForCausalLMMTP Qwen3DSparkModel
    Qwen3NextForCausalLMMTP Qwen3_5ForCausalLMMTP Qwen4ExpForCausalLMMTP Step3p5MTP
    """,
    "another library's model, which says nothing of its attention": """
    MindSporeForCausalLM TransformersForCausalLM TransformersMoEForCausalLM
    """,
    "not seen running: SGLang cannot in one release at all, or nobody has tried": """
    BailingMoeForCausalLMNextN K2HorizonForCausalLM SolarForCausalLM XllmForCausalLM
    """,
}
REFUSED = {name: why for why, names in _REASONS.items() for name in _names(names)}
if release.HAS_NEWER_MODELS:
    REFUSED |= dict.fromkeys(ROW_A_HEAD, "queries that SGLang 0.5.23 drops in a prefill; 0.5.16 does not")


def why_not(name: str) -> str | None:
    """The reason why an architecture is not served where that is asked, None for one that SGLang lacks."""
    own = "a model's own layer for the next token but one, which drafts under EAGLE alone"
    return own if name in OWN_LAYERS.values() else REFUSED.get(name)
