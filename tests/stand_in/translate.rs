//! Kernels in the languages of the other platforms, made with the options that wgpu 30 uses for trusted shaders.
#![allow(dead_code, reason = "every test program uses its part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use naga::back::{hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ResourceBinding, ShaderStage, StorageAccess};

/// A kernel that naga has parsed.
pub struct Parsed {
    module: Module,
    info: ModuleInfo,
    /// Whether each binding may be written.
    pub bindings: Vec<Use>,
}

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    pub written: bool,
}

/// Metal's text of a kernel, and C++ that calls it.
pub struct Metal {
    pub text: String,
    pub glue: String,
}

const UNCHECKED: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Unchecked,
    buffer: BoundsCheckPolicy::Unchecked,
    image_load: BoundsCheckPolicy::Unchecked,
    binding_array: BoundsCheckPolicy::Unchecked,
};

const ENTRY: &str = "main";

/// # Errors
/// What is wrong with the text.
pub fn parse(wgsl: &str) -> Result<Parsed, String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| e.emit_to_string(wgsl))?;
    // unpack2x16float is part of WebGPU's baseline; kernels with native halves may use it, too.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    for (directive, needs) in [
        ("enable f16;", Capabilities::SHADER_FLOAT16),
        (
            "enable wgpu_cooperative_matrix;",
            Capabilities::COOPERATIVE_MATRIX | Capabilities::SUBGROUP,
        ),
    ] {
        if wgsl.contains(directive) {
            capabilities |= needs;
        }
    }
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|e| e.emit_to_string(wgsl))?;
    let mut bindings = BTreeMap::new();
    for (_, variable) in module.global_variables.iter() {
        let (Some(binding), AddressSpace::Storage { access }) = (&variable.binding, variable.space)
        else {
            continue;
        };
        bindings.insert(
            binding.binding,
            Use {
                written: access.contains(StorageAccess::STORE),
            },
        );
    }
    if !bindings.keys().copied().eq(0..bindings.len() as u32) {
        return Err("bindings are not numbered from 0".to_owned());
    }
    Ok(Parsed {
        module,
        info,
        bindings: bindings.into_values().collect(),
    })
}

/// As wgpu-hal's `metal/device.rs` makes it: bindings are numbered in order, and the buffer of sizes comes after them.
///
/// # Errors
/// What naga cannot translate.
pub fn metal(parsed: &Parsed, lang_version: (u8, u8)) -> Result<Metal, String> {
    let resources = (0u8..).zip(&parsed.bindings).map(|(i, used)| {
        let target = msl::BindTarget {
            buffer: Some(i),
            mutable: used.written,
            ..Default::default()
        };
        (binding(i.into()), target)
    });
    let entry = msl::EntryPointResources {
        resources: resources.collect(),
        sizes_buffer: Some(parsed.bindings.len() as u8),
        ..Default::default()
    };
    let options = msl::Options {
        lang_version,
        per_entry_point_map: [(ENTRY.to_owned(), entry)].into(),
        inline_samplers: Vec::new(),
        spirv_cross_compatibility: false,
        fake_missing_bindings: false,
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: false,
        task_dispatch_limits: None,
        mesh_shader_primitive_indices_clamp: false,
        emit_int_div_checks: false,
        ray_query_initialization_tracking: false,
    };
    let pipeline = msl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, ENTRY.to_owned())),
        vertex_pulling_transform: true,
        ..Default::default()
    };
    let (text, translation) = msl::write_string(&parsed.module, &parsed.info, &options, &pipeline)
        .map_err(|error| format!("Metal: {error}"))?;
    let [Ok(name)] = &translation.entry_point_names[..] else {
        return Err(format!("Metal: {:?}", translation.entry_point_names));
    };
    let glue = glue(&text, name, parsed.module.entry_points[0].workgroup_size)?;
    Ok(Metal { text, glue })
}

/// As wgpu-hal's `dx12/device.rs` makes it. With `spirv`, registers are numbered as the bindings, for a compilation to SPIR-V.
///
/// # Errors
/// What naga cannot translate.
pub fn direct3d(parsed: &Parsed, spirv: bool) -> Result<String, String> {
    direct3d_of(parsed, spirv, hlsl::ShaderModel::V6_2)
}

fn direct3d_of(parsed: &Parsed, spirv: bool, model: hlsl::ShaderModel) -> Result<String, String> {
    // Of each kind of register in order.
    let mut next = [0; 2];
    let registers = (0..).zip(&parsed.bindings).map(|(i, used)| {
        let register = &mut next[usize::from(used.written)];
        let target = hlsl::BindTarget {
            register: if spirv { i } else { *register },
            ..Default::default()
        };
        *register += 1;
        (binding(i), target)
    });
    let options = hlsl::Options {
        shader_model: model,
        binding_map: registers.collect(),
        fake_missing_bindings: false,
        zero_initialize_workgroup_memory: false,
        restrict_indexing: false,
        force_loop_bounding: false,
        mesh_shader_primitive_indices_clamp: false,
        ray_query_initialization_tracking: false,
        ..Default::default()
    };
    let pipeline = hlsl::PipelineOptions {
        entry_point: Some((ShaderStage::Compute, ENTRY.to_owned())),
    };
    let mut text = String::new();
    let reflection = hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(&parsed.module, &parsed.info, None)
        .map_err(|error| format!("HLSL: {error}"))?;
    match &reflection.entry_point_names[..] {
        [Ok(name)] if name == ENTRY => Ok(text),
        other => Err(format!("HLSL: {other:?}")),
    }
}

/// As wgpu-hal's `vulkan/device.rs` makes it.
///
/// # Errors
/// What naga cannot translate.
pub fn vulkan(parsed: &Parsed, lang_version: (u8, u8)) -> Result<Vec<u32>, String> {
    let options = spv::Options {
        lang_version,
        flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ray_query_initialization_tracking: false,
        use_storage_input_output_16: false,
        ..Default::default()
    };
    let pipeline = spv::PipelineOptions {
        entry_point: ENTRY.to_owned(),
        shader_stage: ShaderStage::Compute,
    };
    spv::write_vec(&parsed.module, &parsed.info, &options, Some(&pipeline))
        .map_err(|error| format!("SPIR-V: {error}"))
}

/// A kernel in the languages of all platforms.
pub struct Translated {
    pub metal: Metal,
    pub spirv: Vec<u32>,
    /// Empty unless asked for: HLSL has no matrix units.
    pub hlsl: String,
}

/// In every version of each language that wgpu may choose.
///
/// # Errors
/// What is wrong with the text, or what naga cannot translate.
pub fn everywhere(wgsl: &str, with_direct3d: bool) -> Result<Translated, String> {
    let parsed = parse(wgsl)?;
    for version in [(2, 4), (3, 2), (4, 0)] {
        metal(&parsed, version)?;
    }
    let words = vulkan(&parsed, (1, 6))?;
    if words.first() != Some(&0x0723_0203) {
        return Err("SPIR-V: no magic number".to_owned());
    }
    if with_direct3d && !wgsl.contains("enable f16;") {
        // Without DXC, wgpu takes Windows' own compiler, which is older.
        direct3d_of(&parsed, false, hlsl::ShaderModel::V5_1)?;
    }
    Ok(Translated {
        metal: metal(&parsed, (3, 1))?,
        spirv: vulkan(&parsed, (1, 3))?,
        hlsl: match with_direct3d {
            true => direct3d(&parsed, false)?,
            false => String::new(),
        },
    })
}

fn binding(binding: u32) -> ResourceBinding {
    ResourceBinding { group: 0, binding }
}

/// C++ that describes the entry point to the runtime and calls it: one argument per parameter, by its attribute.
fn glue(text: &str, entry: &str, size: [u32; 3]) -> Result<String, String> {
    let missing = || "the entry point is not found in the text".to_owned();
    let start = text
        .find(&format!("kernel void {entry}("))
        .ok_or_else(missing)?;
    let head = &text[start..];
    let open = head.find('(').ok_or_else(missing)?;
    // The list ends at the line that begins with a parenthesis.
    let close = head.find("\n)").ok_or_else(missing)?;
    let mut shared = String::new();
    let mut arguments = Vec::new();
    for line in head[open + 1..close].lines() {
        let line = line.trim().trim_start_matches(',').trim();
        if line.is_empty() {
            continue;
        }
        let (declaration, attribute) = match line.split_once("[[") {
            Some((declaration, rest)) => (declaration.trim(), rest.trim_end_matches("]]").trim()),
            None => (line, ""),
        };
        let unknown = || format!("unknown parameter {line:?}");
        let (ty, name) = declaration.rsplit_once(' ').ok_or_else(unknown)?;
        let ty = ty.trim_end_matches('&').trim();
        let number = attribute
            .strip_prefix("buffer(")
            .and_then(|rest| rest.strip_suffix(')'));
        let value = match (number, ty.strip_prefix("threadgroup ")) {
            (Some(_), _) if ty.contains("_mslBufferSizes") => {
                "*(_mslBufferSizes const*)call.sizes".to_owned()
            }
            (Some(number), _) => format!("*({ty} *)call.buffers[{number}]"),
            (None, Some(ty)) if attribute.is_empty() => {
                // Writing to a String cannot fail.
                let _ = writeln!(shared, "    {{\"{name}\", sizeof({ty}), alignof({ty})}},");
                let number = shared.lines().count() - 1;
                format!("*({ty}*)call.shared[{number}]")
            }
            _ => match attribute {
                "threadgroup_position_in_grid" => "call.group",
                "thread_position_in_threadgroup" => "call.local",
                "thread_position_in_grid" => "call.global",
                "thread_index_in_threadgroup" => "call.index",
                "threadgroups_per_grid" => "call.groups",
                "simdgroup_index_in_threadgroup" => "call.simdgroup",
                "thread_index_in_simdgroup" => "call.lane",
                "threads_per_simdgroup" => "call.lanes",
                "simdgroups_per_threadgroup" => "call.simdgroups",
                _ => return Err(unknown()),
            }
            .to_owned(),
        };
        arguments.push(value);
    }
    let [x, y, z] = size;
    Ok(format!(
        "const shim::Shared shared[] = {{\n{shared}    {{nullptr, 0, 0}}\n}};\n\
         void invoke(const shim::Call& call) {{\n    {entry}({});\n}}\n\
         constexpr shim::Kernel described = {{invoke, shared, {{{x}, {y}, {z}}}}};\n",
        arguments.join(", ")
    ))
}
