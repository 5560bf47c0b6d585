// exp(x - max) / sum of a row, or its logarithm. `lanes` invocations per row; each has the largest element and the sum of its own columns, and
// one reduction joins them.
{# Inside: row is at most the last one, columns are clamped to used - 1 or below used, those finished below width. scratch, folded: as in
   shared/reduce. #}
{% if blocks == 1 %}
// An invocation holds its {{ held }} vec4s of the row in registers: x is read once.
{% endif %}
{% include "shared/group" %}
{% include "shared/softmax" %}
{% if lanes > 1 %}
{% set fold = 1 if lanes <= 16 else (8 if lanes <= 64 else 16) %}
var<workgroup> scratch: array<vec2<f32>, {{ size }}>;
{% if fold > 1 %}
var<workgroup> folded: array<vec2<f32>, {{ size // fold }}>;
{% endif %}
{% macro join(array, first, stride, count) %}
{% for k in range(count) %}
    let part{{ k }} = {{ array }}[{{ first }} + {{ k * stride }}u];
{% endfor %}
    top = part0.x;
{% for k in range(1, count) %}
    top = max(top, part{{ k }}.x);
{% endfor %}
    sum = part0.y * exp(part0.x - top);
{% for k in range(1, count) %}
    sum += part{{ k }}.y * exp(part{{ k }}.x - top);
{% endfor %}
{% endmacro %}

// (maximum, sum of exp(x - maximum)) of a row, from those of its invocations.
fn of_row(part: vec2<f32>, lid: u32) -> vec2<f32> {
    let lane = lid % {{ lanes }}u;
    var top = 0.0;
    var sum = 0.0;
    scratch[lid] = part;
    workgroupBarrier();
{% if fold > 1 %}
    let row = lid / {{ lanes }}u * {{ lanes // fold }}u;
    if (lane < {{ lanes // fold }}u) {
{{ join("scratch", "lid", lanes // fold, fold) }}
        folded[row + lane] = vec2<f32>(top, sum);
    }
    workgroupBarrier();
{{ join("folded", "row", 1, lanes // fold) }}
{% else %}
{{ join("scratch", "lid - lane", 1, lanes) }}
{% endif %}
    return vec2<f32>(top, sum);
}
{% else %}

fn of_row(part: vec2<f32>, lid: u32) -> vec2<f32> {
    return part;
}
{% endif %}

fn largest(v: vec4<f32>) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

fn across(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

// `vec4` number col of a row, with nothing where no data is.
fn column(row: u32, col: u32) -> vec4<f32> {
    let v = x_load(row * x_stride + min(col, {{ used - 1 }}u));
    // A variable: WebGPU refuses constants that are no finite number.
    var lowest = 0xff800000u;
    return select(vec4<f32>(bitcast<f32>(lowest)), v, vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({{ cols }}u));
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
{% if blocks == 1 %}
    var top = LOWEST;
{% for h in range(held) %}
    let x{{ h }} = column(row, lane + {{ h * lanes }}u);
    top = max(top, largest(x{{ h }}));
{% endfor %}
    var sum = vec4<f32>();
{% for h in range(held) %}
    let e{{ h }} = exp(x{{ h }} - top);
    sum += e{{ h }};
{% endfor %}
    let part = vec2<f32>(top, across(sum));
{% else %}
    // Sums of blocks of {{ block }} are added up, by turns.
    var part = vec2<f32>(LOWEST, 0.0);
    var sums = vec4<f32>();
    for (var begin = lane; begin < {{ used }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ used }}u);
        let before = part.x;
        part.y = 0.0;
        for (var col = begin; col < stop; col += {{ lanes }}u) {
            let x = column(row, col);
            let top = max(part.x, largest(x));
            part = vec2<f32>(top, part.y * exp(part.x - top) + across(exp(x - top)));
        }
        sums *= exp(before - part.x);
        sums = vec4<f32>(sums.yzw, sums.x + part.y);
    }
    part.y = across(sums);
{% endif %}
    let whole = of_row(part, lid);
    if (wanted >= {{ rows }}u) {
        return;
    }
{% if log %}
    let norm = if_softmax(log(whole.y), whole.x, whole.y);
{% else %}
    let norm = if_softmax(1.0 / whole.y, whole.x, whole.y);
{% endif %}
{% if blocks == 1 %}
{% if not log %}
    let factor = exp(top - whole.x) * norm;
{% endif %}
{% for h in range(held) %}
{% if (h + 1) * lanes > used %}
    if (lane + {{ h * lanes }}u < {{ width }}u) {
{% else %}
    {
{% endif %}
        finish(row, lane + {{ h * lanes }}u, {% if log %}(x{{ h }} - whole.x) - norm{% else %}e{{ h }} * factor{% endif %});
    }
{% endfor %}
{% else %}
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        let x = column(row, col);
        finish(row, col, {% if log %}(x - whole.x) - norm{% else %}exp(x - whole.x) * norm{% endif %});
    }
{% endif %}
}
