#!/usr/bin/env bash
# The command lines of the reference's training document, with their flags, order and values. Replaced are the script's
# name, by `-m diffsynth_pipe.train`, and the accelerate configurations, by ours. Where the document shows flags without
# a command around them, the command around them here is the one of the LoRA.
#
# Run it where ./models and ./data are. It stops at the first command that fails. Environment:
#   DATASET                     folder with metadata.csv; default: data/example_image_dataset
#   DIFFSYNTH_MODEL_BASE_PATH   where models are, or are downloaded to; default: models
#   EXTRA_FLAGS                 put after each command; the last of a flag counts. A trial on a CPU:
#                               "--max_pixels 4096 --max_steps 3 --encode_dtype float32"
set -euo pipefail

DATASET=${DATASET:-data/example_image_dataset}
MODELS=${DIFFSYNTH_MODEL_BASE_PATH:-models}
EXTRA_FLAGS=${EXTRA_FLAGS:-}
LAUNCH_FILES=$(cd "$(dirname "$0")/accelerate" && pwd)

echo "== full training, ZeRO-2 with CPU offload"
accelerate launch --config_file "$LAUNCH_FILES/zero2_cpu_offload.yaml" -m diffsynth_pipe.train \
  --dataset_base_path "$DATASET" \
  --dataset_metadata_path "$DATASET/metadata.csv" \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 1e-5 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/Qwen-Image_full" \
  --trainable_models "dit" \
  --use_gradient_checkpointing \
  --find_unused_parameters \
  $EXTRA_FLAGS

echo "== low-VRAM LoRA, stage 1"
accelerate launch -m diffsynth_pipe.train \
  --dataset_base_path "$DATASET" \
  --dataset_metadata_path "$DATASET/metadata.csv" \
  --max_pixels 1048576 \
  --dataset_repeat 1 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 1e-4 \
  --num_epochs 5 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/Qwen-Image_lora-splited-cache" \
  --lora_base_model "dit" \
  --lora_target_modules "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1" \
  --lora_rank 32 \
  --task "sft:data_process" \
  --use_gradient_checkpointing \
  --dataset_num_workers 8 \
  --find_unused_parameters \
  $EXTRA_FLAGS

echo "== low-VRAM LoRA, stage 2, ZeRO-3 with CPU offload"
accelerate launch --config_file "$LAUNCH_FILES/zero3_cpu_offload.yaml" -m diffsynth_pipe.train \
  --dataset_base_path "./models/train/Qwen-Image_lora-splited-cache" \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors" \
  --learning_rate 1e-4 \
  --num_epochs 5 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/Qwen-Image_lora" \
  --lora_base_model "dit" \
  --lora_target_modules "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1" \
  --lora_rank 32 \
  --task "sft:train" \
  --use_gradient_checkpointing \
  --dataset_num_workers 8 \
  --find_unused_parameters \
  --initialize_model_on_cpu \
  $EXTRA_FLAGS

echo "== the same LoRA in one stage"
accelerate launch --config_file "$LAUNCH_FILES/zero3_cpu_offload.yaml" -m diffsynth_pipe.train \
  --dataset_base_path "$DATASET" \
  --dataset_metadata_path "$DATASET/metadata.csv" \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 1e-4 \
  --num_epochs 5 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/Qwen-Image_lora-one-stage" \
  --lora_base_model "dit" \
  --lora_target_modules "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1" \
  --lora_rank 32 \
  --task "sft" \
  --use_gradient_checkpointing \
  --dataset_num_workers 8 \
  --find_unused_parameters \
  --initialize_model_on_cpu \
  $EXTRA_FLAGS

# As the document prints it; JSON allows no comma before a bracket.
MODEL_PATHS='[
    [
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00001-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00002-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00003-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00004-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00005-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00006-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00007-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00008-of-00009.safetensors",
        "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model-00009-of-00009.safetensors"
    ],
    [
        "models/Qwen/Qwen-Image/text_encoder/model-00001-of-00004.safetensors",
        "models/Qwen/Qwen-Image/text_encoder/model-00002-of-00004.safetensors",
        "models/Qwen/Qwen-Image/text_encoder/model-00003-of-00004.safetensors",
        "models/Qwen/Qwen-Image/text_encoder/model-00004-of-00004.safetensors"
    ],
    "models/Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors"
]'

echo "== LoRA, models by their files"
accelerate launch -m diffsynth_pipe.train \
  --dataset_base_path "$DATASET" \
  --dataset_metadata_path "$DATASET/metadata.csv" \
  --model_paths "${MODEL_PATHS//models\//$MODELS/}" \
  --output_path "./models/train/Qwen-Image_lora-by-paths" \
  --lora_base_model dit --lora_target_modules "to_q,to_k,to_v" --lora_rank 32 \
  $EXTRA_FLAGS

# The document also names a controlnet here, which Qwen-Image's pipeline does not have.
echo "== text encoder and LoRA, one model by its file and two by id"
accelerate launch -m diffsynth_pipe.train \
  --dataset_base_path "$DATASET" \
  --dataset_metadata_path "$DATASET/metadata.csv" \
  --model_paths "[\"$MODELS/Qwen/Qwen-Image/vae/diffusion_pytorch_model.safetensors\"]" \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:text_encoder/model*.safetensors" \
  --output_path "./models/train/Qwen-Image_text-encoder" \
  --trainable_models "text_encoder" --lora_base_model dit --lora_target_modules "to_q,to_k,to_v" --lora_rank 32 \
  $EXTRA_FLAGS
