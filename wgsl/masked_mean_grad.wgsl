// An invocation counts the mask of its sample once and writes `steps` time steps of a vec4 of columns.
{# Inside: sample < samples, t < time, so row < samples time = rows; dy is read for col < used, which is finished for col < width. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    let col = i % {{ width }}u;
    let run = i / {{ width }}u;
    let sample = run / {{ runs }}u;
    if (sample >= {{ samples }}u) {
        return;
    }
    var count = 0.0;
    for (var t = 0u; t < {{ time }}u; t++) {
        count += mask_at(sample * {{ time }}u + t);
    }
    var v = vec4<f32>();
    if (col < {{ used }}u) {
        v = dy_load(sample * dy_stride + col) / max(count, 1.0);
    }
    let begin = (run % {{ runs }}u) * {{ steps }}u;
    for (var t = begin; t < min(begin + {{ steps }}u, {{ time }}u); t++) {
        let row = sample * {{ time }}u + t;
        finish(row, col, v * mask_at(row));
    }
}
