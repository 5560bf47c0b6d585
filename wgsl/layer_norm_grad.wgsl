// dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma. Both means in one reduction.
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    let mean = stats_at(row);
    let rstd = stats_at(stats_stride + row);
    var g_sum = vec4<f32>();
    var gx_sum = vec4<f32>();
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let g = tail(col, dy_load(row * dy_stride + col) * gamma_load(col));
        g_sum += g;
        gx_sum += g * (x_load(row * x_stride + col) - mean) * rstd;
    }
    let sums = reduce(vec4<f32>(across(g_sum), across(gx_sum), 0.0, 0.0), lid) * {{ 1.0 / cols }};
    if (wanted >= {{ rows }}u) {
        return;
    }
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        var dx = vec4<f32>();
        if (col < {{ used }}u) {
            let g = dy_load(row * dy_stride + col) * gamma_load(col);
            let xhat = (x_load(row * x_stride + col) - mean) * rstd;
            dx = rstd * (g - sums.x - xhat * sums.y);
        }
        finish(row, col, dx);
    }
}
