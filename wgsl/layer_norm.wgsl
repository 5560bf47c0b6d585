// `lanes` invocations a row, `size / lanes` rows a workgroup. Two passes over the row: mean, then variance around it.
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    var sum = vec4<f32>();
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        sum += x_load(row * x_stride + col);
    }
    let mean = across(reduce(sum, lid)) * {{ 1.0 / cols }};
    sum = vec4<f32>();
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let d = tail(col, x_load(row * x_stride + col) - mean);
        sum += d * d;
    }
    let rstd = inverseSqrt(across(reduce(sum, lid)) * {{ 1.0 / cols }} + {{ eps }});
    if (wanted >= {{ rows }}u) {
        return;
    }
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        var y = vec4<f32>();
        if (col < {{ used }}u) {
            y = (x_load(row * x_stride + col) - mean) * rstd * gamma_load(col) + beta_load(col);
        }
        finish(row, col, y);
    }
    if (lane == 0u) {
        stats_put(row, mean);
        stats_put(stats_stride + row, rstd);
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < stats_stride; i++) {
                stats_put(i, 0.0);
                stats_put(stats_stride + i, 0.0);
            }
        }
    }
}
